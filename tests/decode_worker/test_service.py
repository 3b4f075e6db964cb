"""The decode worker over a real connection: one stream per router, and what a lost router leaves behind."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from decode_worker import handover
from decode_worker.service import DecodeServicer
from tandem import rpc
from tandem.output import OutputDelta
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.request import FinishReason
from tests.decode_worker.rig import decoding, make_order, store_kv
from tests.serving import FINGERPRINT, PATIENCE_S, Gate, greedy, prompt_of, until


class Router:
    """One stream to the worker: orders out, news in, sorted by request."""

    def __init__(self, rig, stub) -> None:
        self._rig = rig
        self.call = stub.Decode()
        self.messages: list[pb.DecodeResponse] = []
        self._news: dict[tuple[str, int], asyncio.Queue] = {}
        self._reading = asyncio.ensure_future(self._read())
        self.status: grpc.aio.AioRpcError | None = None

    async def _read(self) -> None:
        try:
            while (message := await self.call.read()) is not grpc.aio.EOF:
                self.messages.append(message)
                for event in message.events:
                    self._queue(event.request_id, event.epoch).put_nowait(event)
        except grpc.aio.AioRpcError as error:
            self.status = error

    def _queue(self, request_id, epoch=0) -> asyncio.Queue:
        return self._news.setdefault((request_id, epoch), asyncio.Queue())

    async def start(self, work):
        handle = await store_kv(self._rig.running, work)
        await self.send(start=pb.StartDecode(work=work.to_pb(), handle=handle.to_pb()))
        return handle

    async def send(self, **command) -> None:
        await self.call.write(pb.DecodeRequest(**command))

    async def cancel(self, request_id, epoch=0) -> None:
        await self.send(cancel=pb.CancelDecode(request_id=request_id, epoch=epoch))

    async def next(self, request_id, epoch=0) -> pb.SequenceEvent:
        async with asyncio.timeout(PATIENCE_S):
            return await self._queue(request_id, epoch).get()

    async def started(self, request_id) -> None:
        assert (await self.next(request_id)).WhichOneof("event") == "started"

    async def output(self, request_id) -> tuple[int, ...]:
        """All tokens until the end."""
        tokens: tuple[int, ...] = ()
        while True:
            event = await self.next(request_id)
            assert event.WhichOneof("event") == "output", event
            delta = OutputDelta.from_pb(event.output)
            tokens += delta.token_ids
            if delta.finish is not None:
                assert delta.finish is FinishReason.LENGTH
                return tokens

    async def failure(self, request_id, epoch=0) -> pb.WorkFailed:
        event = await self.next(request_id, epoch)
        assert event.WhichOneof("event") == "failed", event
        return event.failed

    async def over(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait({self._reading})

    async def close(self) -> None:
        self.call.cancel()
        await self.over()


@asynccontextmanager
async def serving(**options):
    """A rig behind a server; yields it and a way to make routers."""
    async with decoding(**options) as rig:
        server = rpc.server(public=False)
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(rig.worker, FINGERPRINT), server)
        port = rpc.bind(server, "127.0.0.1", 0)
        await server.start()
        routers: list[Router] = []
        async with rpc.channel(f"127.0.0.1:{port}") as channel:
            stub = worker_pb2_grpc.DecodeServiceStub(channel)

            def connect() -> Router:
                routers.append(Router(rig, stub))
                return routers[-1]

            yield rig, connect
            for router in routers:
                await router.close()
        await server.stop(None)


async def test_orders_in_tokens_out():
    async with serving() as (_, connect):
        router = connect()
        await router.send(open=pb.OpenSession(router_id="router-0"))
        await router.start(make_order("a"))
        event = await router.next("a")
        assert event.started.kv_wait_ns > 0
        assert event.started.kv_read_ns > 0
        assert await router.output("a") == greedy(prompt_of(20), 8)[1:]


async def test_one_message_per_step_holds_all_of_a_routers_sequences():
    gate = Gate()
    async with serving(forward=gate, max_batch=8) as (_, connect):
        first, second = connect(), connect()
        for name in ("a", "b", "c"):
            await first.start(make_order(name, max_tokens=9))
            await first.started(name)
        await second.start(make_order("x", max_tokens=9))
        await second.started("x")
        await until(lambda: gate.entered == 1)
        gate.let()  # the step that "a" began alone
        await until(lambda: gate.entered == 2)
        await until(lambda: len(first.messages) == 4)
        for step in range(1, 4):
            gate.let()
            await until(lambda step=step: (len(first.messages), len(second.messages)) == (4 + step, 1 + step))
            assert [event.request_id for event in first.messages[-1].events] == ["a", "b", "c"]
            assert [event.request_id for event in second.messages[-1].events] == ["x"]
        gate.open()
        await second.output("x")


async def test_tokens_between_the_first_and_the_last_travel_together(monkeypatch):
    """Where steps are faster than messages are worth; a beginning, a first token and an end never wait."""
    monkeypatch.setattr(handover, "pace_s", lambda *_: 60.0)
    gate = Gate()
    async with serving(forward=gate) as (_, connect):
        router = connect()
        await router.start(make_order("a", max_tokens=9))
        await router.started("a")
        gate.let()
        first = (await router.next("a")).output.token_ids
        assert len(first) == 1
        gate.open()
        assert (*first, *await router.output("a")) == greedy(prompt_of(20), 9)[1:]
        assert len(router.messages) == 3


async def test_a_cancelled_sequence_leaves_and_the_others_go_on():
    gate = Gate()
    async with serving(forward=gate) as (rig, connect):
        router = connect()
        for name in ("a", "b"):
            await router.start(make_order(name, max_tokens=9))
            await router.started(name)
        await router.cancel("a")
        await asyncio.sleep(0.05)
        gate.open()
        assert await router.output("b") == greedy(prompt_of(20), 9)[1:]
        await until(lambda: rig.pool.audit().is_empty)


async def test_unknown_late_and_repeated_cancellations_are_ignored():
    async with serving() as (_, connect):
        router = connect()
        await router.cancel("never-heard-of")
        await router.start(make_order("a"))
        await router.started("a")
        await router.cancel("a", epoch=7)
        await router.output("a")
        await router.cancel("a")
        await router.cancel("a")
        await router.start(make_order("b"))
        await router.started("b")
        assert len(await router.output("b")) == 7


async def test_another_build_or_a_senseless_order_fails_alone():
    async with serving() as (rig, connect):
        router = connect()
        await router.start(make_order("good"))
        work = make_order("bad").to_pb()
        handle = await store_kv(rig.running, make_order("bad"))
        orders = []
        for number in range(7):
            order = pb.StartDecode(work=work, handle=handle.to_pb())
            order.work.epoch = number
            orders.append(order)
        orders[0].work.fingerprint = bytes(32)
        orders[1].work.ClearField("token_ids")
        orders[2].work.sampling.ClearField("max_tokens")
        orders[3].work.token_ids.append(257)
        orders[4].handle.ClearField("object_id")
        orders[5].work.sampling.top_p = 7
        orders[6].work.sampling.max_tokens = 1 << 20
        for order in orders:
            await router.send(start=order)
        reasons = [(await router.failure("bad", number)).reason for number in range(7)]
        assert reasons == [
            "FINGERPRINT_MISMATCH",
            "BAD_MESSAGE",
            "BAD_MESSAGE",
            "BAD_PARAM",
            "BAD_MESSAGE",
            "BAD_PARAM",
            "NEVER_FITS",
        ]
        await router.started("good")
        assert len(await router.output("good")) == 7
        await rig.running.client.release(handle)


async def test_an_order_nobody_foresaw_fails_alone(monkeypatch):
    async with serving() as (rig, connect):
        router = connect()
        monkeypatch.setattr(rig.worker, "start", None)
        handle = await router.start(make_order("bad"))
        failure = await router.failure("bad")
        assert (failure.reason, failure.message) == ("BUG", "internal error")
        monkeypatch.undo()
        await router.start(make_order("good"))
        await router.started("good")
        await router.output("good")
        await rig.running.client.release(handle)


async def test_a_second_order_for_a_running_attempt_is_ignored():
    gate = Gate()
    async with serving(forward=gate) as (rig, connect):
        router = connect()
        work = make_order("a")
        handle = await router.start(work)
        await router.started("a")
        await router.send(start=pb.StartDecode(work=work.to_pb(), handle=handle.to_pb()))
        await asyncio.sleep(0.05)
        assert (rig.worker.num_running, rig.worker.num_waiting) == (1, 0)
        gate.open()
        assert await router.output("a") == greedy(prompt_of(20), 8)[1:]
        assert router._queue("a").empty()


@pytest.mark.parametrize("how", ["cancel", "half-close"])
async def test_a_router_that_hangs_up_takes_its_sequences_along(how):
    gate = Gate()
    async with serving(forward=gate, max_batch=2) as (rig, connect):
        leaves, stays = connect(), connect()
        for index in range(3):
            await leaves.start(make_order(f"l{index}", max_tokens=40))
            await leaves.started(f"l{index}")
        await stays.start(make_order("stays"))
        await stays.started("stays")
        if how == "cancel":
            leaves.call.cancel()
        else:
            await leaves.call.done_writing()
        await leaves.over()
        await asyncio.sleep(0.05)
        gate.open()
        assert await stays.output("stays") == greedy(prompt_of(20), 8)[1:]
        await until(lambda: rig.pool.audit().is_empty)
        assert gate.entered < 20


async def test_a_router_that_stops_reading_and_leaves_is_noticed():
    """Its stream is full, so the worker waits inside a write when the router goes."""
    async with serving(num_blocks=512, max_batch=64) as (rig, connect):
        router = connect()
        router._reading.cancel()
        for index in range(8):
            await router.start(
                make_order(f"r{index}", prompt_of(8), max_tokens=400, logprobs=20, ignore_eos=True)
            )
        await asyncio.sleep(0.3)
        router.call.cancel()
        await until(lambda: rig.worker.num_running == 0)
        await until(lambda: rig.pool.audit().is_empty)


async def test_malformed_bytes_end_the_session_with_bad_message():
    async with serving() as (rig, connect):
        router = connect()
        handle = await router.start(make_order("a", max_tokens=40))
        await router.started("a")
        router.call._request_serializer = lambda message: b"\xff\xff\xff"
        await router.send(open=pb.OpenSession())
        await router.over()
        assert router.status is not None
        assert rpc.to_tandem_error(router.status).reason == "BAD_MESSAGE"
        await until(lambda: rig.pool.audit().is_empty)
        again = connect()
        await again.start(make_order("b"))
        await again.started("b")
        await again.output("b")
        await rig.running.client.release(handle)


async def test_what_goes_wrong_later_reaches_the_router():
    async with serving() as (rig, connect):
        router = connect()
        work = make_order("a")
        handle = await store_kv(rig.running, work)
        await rig.running.client.release(handle)
        await router.send(start=pb.StartDecode(work=work.to_pb(), handle=handle.to_pb()))
        failure = await router.failure("a")
        assert failure.reason == "STALE_HANDLE"
        assert failure.message


async def test_an_order_that_is_refused_gives_back_what_was_fetched_for_it():
    async with serving() as (rig, connect):
        rig.running.client._may_map = False
        router, order = connect(), make_order("bad")
        handle = await store_kv(rig.running, order)
        ahead, bad = order.to_pb(), order.to_pb()
        ahead.token_ids.pop()
        bad.sampling.top_p = 7
        await router.send(prefetch=pb.PrefetchKv(work=ahead, handle=handle.to_pb()))
        await until(lambda: rig.pool.audit().owned)
        await router.send(start=pb.StartDecode(work=bad, handle=handle.to_pb()))
        assert (await router.failure("bad", order.epoch)).reason == "BAD_PARAM"
        await until(lambda: not rig.pool.audit().owned)
