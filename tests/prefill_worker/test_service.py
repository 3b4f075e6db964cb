"""The prefill worker over a real connection: what the router sees, and what a lost router leaves behind."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from kvstore.key import KvHandle
from prefill_worker.service import PrefillServicer
from tandem import rpc
from tandem.errors import FailedPrecondition
from tandem.output import OutputDelta
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tests.prefill_worker.rig import prefilling
from tests.prefill_worker.test_worker import LONG, Held
from tests.serving import FINGERPRINT, Gate, greedy, make_work, prompt_of, until


@asynccontextmanager
async def serving(**options):
    """A rig behind a server; yields it and a stub."""
    async with prefilling(**options) as rig:
        server = rpc.server(public=False)
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(rig.worker, FINGERPRINT), server)
        port = rpc.bind(server, "127.0.0.1", 0)
        await server.start()
        async with rpc.channel(f"127.0.0.1:{port}") as channel:
            yield rig, worker_pb2_grpc.PrefillServiceStub(channel)
        await server.stop(None)


def request(*args, **options) -> pb.PrefillRequest:
    return pb.PrefillRequest(work=make_work(*args, **options).to_pb())


async def events_of(call) -> list[str]:
    return [event.WhichOneof("event") async for event in call]


async def failure_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events_of(call)
    return rpc.to_tandem_error(caught.value)


async def test_first_token_then_handle():
    async with serving() as (rig, stub):
        events = {e.WhichOneof("event"): e async for e in stub.Prefill(request(token_ids=prompt_of(40)))}
        assert [name for name in events if name != "kv_opened"] == ["first_token", "kv_sealed"]
        assert OutputDelta.from_pb(events["first_token"].first_token).token_ids == greedy(prompt_of(40), 1)
        handle = KvHandle.from_pb(events["kv_sealed"].kv_sealed.handle)
        assert handle.num_tokens == 40
        assert events["kv_sealed"].kv_sealed.send_ns > 0
        assert (await rig.running.client.stat(handle)).num_bytes == handle.num_bytes, "nobody released it"
        await rig.running.client.release(handle)


async def test_no_handle_follows_a_token_that_is_the_last():
    async with serving() as (_, stub):
        assert await events_of(stub.Prefill(request(max_tokens=1))) == ["first_token"]


async def test_another_build_is_refused():
    async with serving() as (rig, stub):
        message = request()
        message.work.fingerprint = bytes(32)
        error = await failure_of(stub.Prefill(message))
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "FINGERPRINT_MISMATCH"
        assert rig.worker.num_waiting == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda work: work.ClearField("token_ids"), "BAD_MESSAGE"),
        (lambda work: work.ClearField("num_prompt_tokens"), "BAD_MESSAGE"),
        (lambda work: setattr(work, "num_prompt_tokens", 21), "BAD_MESSAGE"),
        (lambda work: work.sampling.ClearField("max_tokens"), "BAD_MESSAGE"),
        (lambda work: work.sampling.ClearField("seed"), "BAD_MESSAGE"),
        (lambda work: work.token_ids.append(257), "BAD_MESSAGE"),
        (lambda work: setattr(work.sampling, "temperature", 9), "BAD_PARAM"),
    ],
)
async def test_an_order_that_makes_no_sense_harms_nobody(spoil, reason):
    async with serving() as (rig, stub):
        message = request("bad", max_tokens=1)
        spoil(message.work)
        assert (await failure_of(stub.Prefill(message))).reason == reason
        assert await events_of(stub.Prefill(request("good", max_tokens=1))) == ["first_token"]
        assert rig.worker.num_waiting == 0


async def test_what_the_worker_says_reaches_the_router():
    async with serving(num_blocks=2) as (rig, stub):
        assert (await failure_of(stub.Prefill(request(token_ids=prompt_of(33))))).reason == "NEVER_FITS"
        rig.pool.allocate("somebody", 32)
        assert (await failure_of(stub.Prefill(request(timeout_s=0.15)))).reason == "DEADLINE_PREFILL"
        rig.pool.release("somebody")


async def test_a_failed_hand_off_comes_after_its_token():
    """A client drops what it has not read when a failure arrives: the put waits for the token's reader."""
    was_read = asyncio.Event()

    @asynccontextmanager
    async def put(make, header):
        await was_read.wait()
        async with make(header) as writer:
            yield writer

    async with serving(store_bytes=1000, client={"put": put}) as (_, stub):
        call = stub.Prefill(request())
        assert (await call.read()).WhichOneof("event") == "first_token"
        was_read.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert rpc.to_tandem_error(caught.value).reason == "NEVER_FITS"


async def test_hanging_up_while_the_prompt_waits():
    async with serving(num_blocks=2) as (rig, stub):
        rig.pool.allocate("somebody", 32)
        call = stub.Prefill(request())
        call_task = asyncio.ensure_future(call.read())
        await until(lambda: rig.worker.num_waiting == 1)
        call.cancel()
        await asyncio.wait({call_task})
        await until(lambda: rig.worker.num_waiting == 0)
        rig.pool.release("somebody")


async def test_hanging_up_between_chunks():
    gate = Gate()
    async with serving(forward=gate, **LONG) as (rig, stub):
        call = stub.Prefill(request(token_ids=prompt_of(100)))
        reading = asyncio.ensure_future(call.read())
        gate.let()
        await until(lambda: gate.entered == 2)
        call.cancel()
        await asyncio.wait({reading})
        await until(lambda: rig.worker._long[0].is_cancelled)
        gate.let()
        await until(lambda: rig.pool.audit().is_empty)
        assert gate.entered == 2
        await rig.running.freed()


async def test_hanging_up_during_the_hand_off():
    held = Held()
    async with serving(client={"put": held.put}) as (rig, stub):
        call = stub.Prefill(request())
        await call.read()
        await held.entered.wait()
        call.cancel()
        await asyncio.sleep(0.05)
        held.may_go.set()
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.freed()


async def test_a_router_that_is_lost_takes_its_prompts_along():
    gate = Gate()
    async with serving(forward=gate) as (rig, stub):
        calls, reading = [], []
        for index in range(5):
            calls.append(stub.Prefill(request(f"r{index}")))
            reading.append(asyncio.ensure_future(calls[-1].read()))
            await until(lambda index=index: (gate.entered, rig.worker.num_waiting) == (1, index))
        for call in calls:
            call.cancel()
        await asyncio.wait(reading)
        await asyncio.sleep(0.05)
        gate.open()
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.freed()
        assert rig.store.counters.sealed == 0
        assert gate.entered == 1
