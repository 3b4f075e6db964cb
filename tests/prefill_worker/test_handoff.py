"""KV on its way to the store: every cell once, nothing bad sealed, nothing freed too early, nothing left."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.key import KvHandle
from kvstore.objects import ObjectState
from kvstore.parts import parts_of
from prefill_worker.handoff import HOLD, Handoff, Step
from prefill_worker.job import KvOpened, PrefillJob
from prefill_worker.sender import ObjectSender
from tandem.engine.block_pool import BlockPool
from tandem.engine.kv_transfer import export_kv
from tandem.engine.paged_cache import PagedCache
from tandem.errors import TandemError
from tests.prefill_worker.rig import make_context
from tests.serving import (
    BLOCK_SIZE,
    NAN,
    PATIENCE_S,
    Meddler,
    assert_empties,
    make_model,
    make_work,
    prompt_of,
    running_store,
    until,
)

LAYER_BYTES = 7 * BLOCK_SIZE * 2 * 2 * 16 * 4  # of 100 tokens: keys and values of 2 heads of 16 numbers

# --- how an object is cut ------------------------------------------------------------------------


@given(
    num_layers=st.integers(1, 9),
    cell_tokens=st.sampled_from([1, 4, 16]),
    chunk_bytes=st.integers(1, 20_000),
    start=st.integers(0, 5),
    count=st.integers(0, 12),
)
def test_every_cell_travels_once_in_small_parts(num_layers, cell_tokens, chunk_bytes, start, count):
    geometry = replace(make_model(1).geometry, num_layers=num_layers, num_kv_heads=1, head_dim=4)
    cache = PagedCache(geometry, 1, cell_tokens)
    parts = parts_of(num_layers, cache.block_bytes, chunk_bytes, start, start + count)
    cells = Counter(
        (block, layer)
        for part in parts
        for block in range(part.block_start, part.block_start + part.num_blocks)
        for layer in range(part.layer_start, part.layer_start + part.num_layers)
    )
    expected = [(block, layer) for block in range(start, start + count) for layer in range(num_layers)]
    assert cells == Counter(expected)
    cell_bytes = cache.block_bytes // num_layers
    for part in parts:
        assert part.num_cells == 1 or part.num_cells * cell_bytes <= chunk_bytes
    if parts and chunk_bytes < cache.block_bytes:
        assert all(part.num_blocks == 1 for part in parts), "a block larger than a chunk is split by layers"


# --- sending -------------------------------------------------------------------------------------


class Sender:
    """One prompt with computed KV, ready to be handed off."""

    def __init__(self, running, *, length=100, chunk_bytes=1 << 20, name="r", **client) -> None:
        self.running = running
        self.model = make_model(16)
        self.pool = BlockPool("prefill", 16, BLOCK_SIZE)
        self.events: list[object] = []
        self.ended = asyncio.Event()
        self.job = PrefillJob(make_work(name, prompt_of(length)), self.events.append)
        self.job.blocks = self.pool.allocate(name, length) or []
        values = torch.randn(len(self.job.blocks), 2, 2, BLOCK_SIZE, 2, 16)
        self.model.cache.write_blocks(self.job.blocks, values.numpy().tobytes())
        self.context = make_context(Meddler(running.client, **client), self.model, self.pool, chunk_bytes)
        self.writes = 0

    def start(self) -> Handoff:
        assert self.pool.hold("r", HOLD)
        return Handoff(self.context, self.job, tuple(self.job.blocks), lambda job: self.ended.set())

    async def end(self) -> None:
        """The request is done with its blocks, the hand-off is over: everything must be free."""
        async with asyncio.timeout(PATIENCE_S):
            await self.ended.wait()
        self.pool.release("r")
        await assert_empties(self.pool)


@pytest.fixture
async def running():
    async with running_store() as running:
        yield running
        await running.freed()


def watch_writes(on_write):
    """Wraps `client.put` so that `on_write(number)` is awaited before each chunk."""

    def put(make, header):
        return _Watched(make(header), on_write)

    return put


class _Watched:
    def __init__(self, writer, on_write) -> None:
        self._writer, self._on_write, self._num = writer, on_write, 0

    async def __aenter__(self):
        await self._writer.__aenter__()
        return self

    async def __aexit__(self, *error):
        await self._writer.__aexit__(*error)

    @property
    def handle(self):
        return self._writer.handle

    @property
    def busy_s(self):
        return self._writer.busy_s

    async def write(self, where, payload):
        self._num += 1
        await self._on_write(self._num)
        await self._writer.write(where, payload)

    async def seal(self):
        handle = await self._writer.seal()
        await self._on_write(0)
        return handle


@pytest.mark.parametrize("steps", [[100], [16, 100], [10, 20, 50, 99, 100], [32, 64, 96, 100]])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 10_000, 3000])
async def test_what_is_stored_is_what_was_computed(running, steps, chunk_bytes):
    sender = Sender(running, chunk_bytes=chunk_bytes)
    handoff = sender.start()
    for num_computed in steps:
        handoff.advance(Step(num_computed))
        await asyncio.sleep(0)
    await sender.end()
    *opened, handle = sender.events
    assert isinstance(handle, KvHandle)
    assert handle == sender.job.handle
    assert opened == [KvOpened(handle)] * (len(steps) > 1)
    assert handle.num_tokens == 100
    other = PagedCache(sender.model.geometry, 16, BLOCK_SIZE)
    async for chunk, payload in running.client.get(handle, "reader"):
        blocks = range(chunk.block_start, chunk.block_start + chunk.num_blocks)
        other.write_blocks(list(blocks), payload, chunk.layer_start, chunk.num_layers)
    expected = export_kv(sender.model.cache, sender.job.blocks, 100, 0, 2)
    assert bytes(export_kv(other, range(7), 7 * BLOCK_SIZE, 0, 2)) == bytes(expected)
    assert not other.read_blocks([6])[:, :, :, 100 % BLOCK_SIZE :].any(), "slots past the prompt are empty"
    await running.client.release(handle)


async def test_full_blocks_leave_before_the_prompt_is_complete(running):
    sender = Sender(running)
    handoff = sender.start()
    handoff.advance(Step(50))
    await until(lambda: any(obj.digests for obj in running.store._books.objects.values()))
    [opened] = sender.events
    handoff.advance(Step(100))
    await sender.end()
    assert sender.events[1:] == [opened.handle]
    await running.client.release(opened.handle)


async def test_a_chunk_leaves_layer_by_layer_while_it_is_computed(running):
    sender = Sender(running, chunk_bytes=LAYER_BYTES)
    cache, handoff = sender.model.cache, sender.start()
    cache.layers_written = 0
    handoff.advance(Step(100, is_under_way=True))
    await until(lambda: sender.events)
    [obj] = running.store._books.objects.values()
    for num_layers in (1, 2):
        await asyncio.sleep(0.02)
        assert len(obj.digests) == num_layers - 1
        cache.layers_written = num_layers
        await until(lambda: len(obj.digests) == num_layers)  # noqa: B023 (called in this very turn)
    assert obj.state is ObjectState.RESERVED
    handoff.advance(Step(100))
    await sender.end()
    [_, handle] = sender.events
    layers = [chunk.layer_start async for chunk, _ in running.client.get(handle, "reader")]
    assert layers == [0, 1]
    await running.client.release(handle)


async def test_layers_that_do_not_fill_a_message_wait_for_others(running):
    sender = Sender(running, chunk_bytes=2 * LAYER_BYTES)
    cache, handoff = sender.model.cache, sender.start()
    handoff.advance(Step(100, is_under_way=True))
    await until(lambda: sender.events)
    cache.layers_written = 1
    await asyncio.sleep(0.02)
    [obj] = running.store._books.objects.values()
    assert not obj.digests
    cache.layers_written = 2
    await until(lambda: len(obj.digests) == 1)
    handoff.advance(Step(100))
    await sender.end()
    [_, handle] = sender.events
    await running.client.release(handle)


async def test_a_forward_that_ends_before_anybody_looked_is_sent_whole(running):
    sender = Sender(running)
    handoff = sender.start()
    sender.model.cache.layers_written = 0
    handoff.advance(Step(50, is_under_way=True))
    handoff.advance(Step(50))
    handoff.advance(Step(100, is_under_way=True))
    handoff.advance(Step(100))
    await sender.end()
    [_, handle] = sender.events
    assert (await running.client.stat(handle)).num_bytes == handle.num_bytes
    await running.client.release(handle)


async def test_giving_up_midway_frees_the_stored_object(running):
    sender = Sender(running)
    handoff = sender.start()
    handoff.advance(Step(50))
    await until(lambda: running.store.audit().owned)
    handoff.give_up()
    await sender.end()
    assert [type(event) for event in sender.events] == [KvOpened]
    await running.freed()
    assert running.store.counters.sealed == 0


async def test_giving_up_before_anything_was_sent_asks_the_store_for_nothing(running):
    sender = Sender(running)
    sender.start().give_up()
    await sender.end()
    assert running.store.counters.reserved == 0


async def test_a_cancelled_prompt_stops_between_two_parts(running):
    numbers = []

    async def on_write(number):
        numbers.append(number)
        sender.job.is_cancelled = number == 2

    sender = Sender(running, chunk_bytes=10_000, put=watch_writes(on_write))
    sender.start().advance(Step(100))
    await sender.end()
    assert (sender.events, numbers) == ([], [1, 2])
    await running.freed()
    assert running.store.counters.sealed == 0


async def test_what_was_sealed_for_nobody_is_released(running):
    async def on_write(number):
        sender.job.is_cancelled = number == 0  # 0: the seal is done, its handle not yet passed on

    sender = Sender(running, put=watch_writes(on_write))
    sender.start().advance(Step(100))
    await sender.end()
    assert sender.events == []
    assert running.store.counters.sealed == 1
    await running.freed()


@pytest.mark.parametrize("block", [0, 3, 6])
@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
async def test_kv_that_is_not_finite_is_never_sealed(running, block, value):
    sender = Sender(running, chunk_bytes=10_000)
    sender.model.cache._data[1, 0, 1, sender.job.blocks[block], 2, 3] = value
    sender.start().advance(Step(100))
    await sender.end()
    (error,) = sender.events
    assert error.reason == "NUMERICS"
    assert sender.job.is_cancelled, "the rest of the prompt need not be computed"
    assert running.store.counters.sealed == 0


async def test_garbage_behind_the_last_token_does_not_matter(running):
    sender = Sender(running)
    sender.model.cache._data[:, :, :, sender.job.blocks[-1], 100 % BLOCK_SIZE :] = NAN
    sender.start().advance(Step(100))
    await sender.end()
    await running.client.release(sender.events[0])


async def test_blocks_stay_until_the_put_has_ended(running):
    may_write, waiting = asyncio.Event(), asyncio.Event()

    async def on_write(number):
        waiting.set()
        await may_write.wait()

    sender = Sender(running, put=watch_writes(on_write))
    handoff = sender.start()
    handoff.advance(Step(100))
    await waiting.wait()
    sender.pool.release("r")
    handoff.give_up()
    await asyncio.sleep(0.02)
    assert sender.pool.num_free == 9, "somebody may still read the blocks"
    assert [owner.holds for owner in sender.pool.audit().owners] == [(HOLD,)]
    may_write.set()
    async with asyncio.timeout(PATIENCE_S):
        await handoff.wait()
    await assert_empties(sender.pool)


@asynccontextmanager
async def nobody():
    raise RuntimeError("not foreseen")
    yield


@pytest.mark.parametrize(
    ("length", "client", "reason"),
    [
        (240, {}, "NEVER_FITS"),
        (100, {"put": lambda make, header: nobody()}, "BUG"),
    ],
)
async def test_a_failed_put_is_said_once_and_ends_the_prompt(length, client, reason):
    async with running_store(total_bytes=100_000) as running:
        sender = Sender(running, length=length, **client)
        sender.start().advance(Step(length))
        await sender.end()
        (error,) = sender.events
        assert isinstance(error, TandemError)
        assert error.reason == reason
        assert "not foreseen" not in str(error)
        assert sender.job.is_cancelled
        await running.freed()


async def test_a_store_that_is_gone_is_store_down():
    async with running_store() as running:
        sender = Sender(running)
    sender.start().advance(Step(100))
    await sender.end()
    assert [error.reason for error in sender.events] == ["STORE_DOWN"]


async def test_nothing_is_said_about_a_prompt_that_was_cancelled(running):
    sender = Sender(running)
    sender.model.cache._data[:] = NAN
    sender.job.is_cancelled = True
    sender.start().advance(Step(100))
    await sender.end()
    assert sender.events == []


def header_of(sender):
    """What the store is told about the object."""
    headers = []
    client = Meddler(sender.running.client, put=lambda make, header: headers.append(header))
    ObjectSender(client, sender.context.form, sender.job, sender.model.cache, sender.job.blocks)
    return headers[0]


async def test_a_later_attempt_at_the_same_request_is_an_object_of_its_own(running):
    first, second = Sender(running), Sender(running)
    second.job.work = replace(second.job.work, epoch=1)
    headers = [header_of(sender) for sender in (first, second)]
    assert headers[0].object_id == headers[1].object_id
    assert [header.epoch for header in headers] == [0, 1]
    assert headers[0].total_bytes == 7 * first.model.cache.block_bytes
    first.start().advance(Step(100))
    await first.end()
    assert (await running.client.stat(first.events[0])).state is ObjectState.SEALED
    await running.client.release(first.events[0])
