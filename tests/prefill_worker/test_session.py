"""One stream of prompts to a prefill worker: what a router hears of each, and what it leaves when it goes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from kvstore.key import KvHandle
from prefill_worker.session import PrefillSession
from tandem.output import OutputDelta
from tandem.pb.worker.v1 import worker_pb2 as pb
from tests.prefill_worker.test_service import serving
from tests.prefill_worker.test_worker import LONG, Held
from tests.serving import FINGERPRINT, PATIENCE_S, Gate, greedy, make_work, prompt_of, until


class Router:
    """Its end of the stream: what has come of each prompt, in order."""

    def __init__(self, stub) -> None:
        self.call = stub.StreamPrefill()
        self._news: dict[tuple[str, int], asyncio.Queue] = {}
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        while (message := await self.call.read()) is not grpc.aio.EOF:
            for event in message.events:
                self._queue(event.request_id, event.epoch).put_nowait(event)

    def _queue(self, request_id, epoch=0) -> asyncio.Queue:
        return self._news.setdefault((request_id, epoch), asyncio.Queue())

    async def start(self, *args, **options) -> None:
        await self.call.write(pb.StreamPrefillRequest(start=make_work(*args, **options).to_pb()))

    async def cancel(self, request_id, epoch=0) -> None:
        cancel = pb.CancelPrefill(request_id=request_id, epoch=epoch)
        await self.call.write(pb.StreamPrefillRequest(cancel=cancel))

    async def next(self, request_id) -> pb.PromptEvent:
        """But for that the KV is on its way."""
        async with asyncio.timeout(PATIENCE_S):
            while (event := await self._queue(request_id).get()).progress.HasField("kv_opened"):
                pass
        return event

    async def token(self, request_id) -> OutputDelta:
        event = await self.next(request_id)
        assert event.progress.HasField("first_token"), event
        return OutputDelta.from_pb(event.progress.first_token)

    async def handle(self, request_id) -> KvHandle:
        event = await self.next(request_id)
        assert event.progress.HasField("kv_sealed"), event
        assert event.progress.kv_sealed.send_ns > 0
        return KvHandle.from_pb(event.progress.kv_sealed.handle)

    async def failure(self, request_id) -> pb.WorkFailed:
        event = await self.next(request_id)
        assert event.HasField("failed"), event
        return event.failed

    def is_silent(self, request_id) -> bool:
        """But for that the KV is on its way."""
        return all(event.progress.HasField("kv_opened") for event in self._queue(request_id)._queue)

    async def hang_up(self) -> None:
        self.call.cancel()
        await asyncio.wait({self._reading})


@asynccontextmanager
async def routed(**options):
    """A rig behind a server, and a router on a stream to it."""
    async with serving(**options) as (rig, stub):
        router = Router(stub)
        try:
            yield rig, router
        finally:
            await router.hang_up()


async def test_many_prompts_at_once_each_with_token_and_handle():
    async with routed() as (rig, router):
        prompts = {f"r{index}": prompt_of(20 + index, start=index) for index in range(6)}
        for name, prompt in prompts.items():
            await router.start(name, prompt)
        for name, prompt in prompts.items():
            assert (await router.token(name)).token_ids == greedy(prompt, 1)
            handle = await router.handle(name)
            assert handle.num_tokens == len(prompt)
            await rig.running.client.release(handle)
        await rig.running.freed()


async def test_no_handle_follows_a_token_that_is_the_last():
    async with routed() as (rig, router):
        await router.start(max_tokens=1)
        assert (await router.token("r")).finish is not None
        await until(lambda: rig.pool.audit().is_empty)
        assert router.is_silent("r")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda work: setattr(work, "fingerprint", bytes(32)), "FINGERPRINT_MISMATCH"),
        (lambda work: work.ClearField("token_ids"), "BAD_MESSAGE"),
        (lambda work: setattr(work.sampling, "temperature", 9), "BAD_PARAM"),
        (lambda work: work.token_ids.extend(range(5000)), "BAD_MESSAGE"),
    ],
)
async def test_an_order_that_makes_no_sense_fails_alone(spoil, reason):
    async with routed() as (_, router):
        message = make_work("bad", max_tokens=1).to_pb()
        spoil(message)
        await router.call.write(pb.StreamPrefillRequest(start=message))
        await router.start("good", max_tokens=1)
        assert (await router.failure("bad")).reason == reason
        assert (await router.token("good")).finish is not None


async def test_a_bug_in_one_order_ends_no_other():
    async with routed() as (rig, router):
        submit = rig.worker.submit

        def fail_once(work, emit):
            rig.worker.submit = submit
            raise RuntimeError("secret")

        rig.worker.submit = fail_once
        await router.start("bad")
        await router.start("good", max_tokens=1)
        failed = await router.failure("bad")
        assert failed.reason == "BUG"
        assert "secret" not in failed.message
        assert (await router.token("good")).finish is not None


async def test_a_refusal_brings_its_figures_along():
    """As a status would: the client is told what the store has."""
    async with routed(store_bytes=1000) as (_, router):
        await router.start()
        while not (event := await router.next("r")).HasField("failed"):
            assert event.progress.HasField("first_token")
        assert event.failed.reason == "NEVER_FITS"
        assert event.failed.metadata["free_bytes"] == "1000"
        assert event.failed.error_id


async def test_a_deadline_that_passes_while_the_prompt_waits():
    async with routed(num_blocks=2) as (rig, router):
        rig.pool.allocate("somebody", 32)
        await router.start(timeout_s=0.15)
        assert (await router.failure("r")).reason == "DEADLINE_PREFILL"
        rig.pool.release("somebody")


async def test_the_same_order_twice_is_one():
    gate = Gate()
    async with routed(forward=gate) as (rig, router):
        await router.start(max_tokens=1)
        await until(lambda: gate.entered == 1)
        await router.start(max_tokens=1)
        await router.start("later", max_tokens=1)
        await until(lambda: rig.worker.num_waiting == 1)
        gate.open()
        await router.token("r")
        await router.token("later")
        assert router.is_silent("r")


async def test_a_cancelled_prompt_disturbs_no_other():
    gate = Gate()
    async with routed(forward=gate, **LONG) as (rig, router):
        await router.start("long", prompt_of(100))
        await until(lambda: gate.entered == 1)
        await router.start("short", max_tokens=1)
        await router.cancel("unknown")
        await router.cancel("long", epoch=1)  # of an attempt that is not this one
        await router.cancel("long")
        await until(lambda: rig.worker._long[0].is_cancelled)
        gate.open()
        await router.token("short")
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.freed()
        assert router.is_silent("long")


async def test_cancelling_during_the_hand_off_gives_the_kv_up():
    held = Held()
    async with routed(client={"put": held.put}) as (rig, router):
        await router.start()
        await router.token("r")
        await held.entered.wait()
        await router.cancel("r")
        await asyncio.sleep(0.05)
        held.may_go.set()
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.freed()


async def test_a_router_that_is_lost_takes_its_prompts_along():
    gate = Gate()
    async with routed(forward=gate) as (rig, router):
        for index in range(5):
            await router.start(f"r{index}")
            await until(lambda index=index: (gate.entered, rig.worker.num_waiting) == (1, index))
        await router.hang_up()
        await asyncio.sleep(0.05)
        gate.open()
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.freed()
        assert rig.store.counters.sealed == 0
        assert gate.entered == 1


async def orders(*messages, then: asyncio.Event):
    for message in messages:
        yield message
    await then.wait()


@pytest.mark.parametrize("how", ["lost", "cancelled"])
async def test_kv_of_which_the_router_has_not_heard_is_given_up(how):
    """It is in the store, but the stream had not taken the news, or not sent it, when the router went."""
    async with serving() as (rig, _):
        session, hung_up = PrefillSession(rig.worker, FINGERPRINT), asyncio.Event()
        start = pb.StreamPrefillRequest(start=make_work().to_pb())
        reading = asyncio.ensure_future(session.read(orders(start, then=hung_up)))
        await until(lambda: rig.store.counters.sealed == 1 and session._ended)
        if how == "lost":
            assert await session.take()
            session.close()
        else:
            session._cancel(("r", 0))
        await rig.running.freed()
        hung_up.set()
        await reading


async def test_kv_of_which_the_router_has_heard_is_its_own():
    async with serving() as (rig, _):
        session, hung_up = PrefillSession(rig.worker, FINGERPRINT), asyncio.Event()
        start = pb.StreamPrefillRequest(start=make_work().to_pb())
        reading = asyncio.ensure_future(session.read(orders(start, then=hung_up)))
        await until(lambda: session._ended)
        events = await session.take()
        hung_up.set()
        await reading
        assert await session.take() is None
        session.close()
        await asyncio.sleep(0.05)
        handle = KvHandle.from_pb(events[-1].progress.kv_sealed.handle)
        assert (await rig.running.client.stat(handle)).num_bytes == handle.num_bytes
        await rig.running.client.release(handle)
