"""KV from the store into reserved blocks: held until the last write, checked, and given up after use."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from decode_worker.restore import HOLD, KvRestorer
from decode_worker.sequence import DecodeSequence
from tandem.engine.batch import SequenceRows
from tandem.engine.block_pool import BlockPool
from tandem.engine.work_state import sampling_state
from tandem.errors import DataLoss, FailedPrecondition, TandemError
from tests.decode_worker.rig import make_order, store_kv
from tests.serving import (
    BLOCK_SIZE,
    Gate,
    Meddler,
    assert_empties,
    make_model,
    prompt_of,
    running_store,
    tokenizer,
    until,
)


class Bench:
    """A sequence with blocks, and the restorer to fill them."""

    def __init__(self, running, work, handle, write_blocks=None) -> None:
        self.model = make_model(16)
        self.pool = BlockPool("decode", 16, BLOCK_SIZE)
        cache = Meddler(self.model.cache, write_blocks=write_blocks) if write_blocks else self.model.cache
        self.restorer = KvRestorer(running.client, cache, self.pool)
        self.sequence = DecodeSequence(
            work,
            handle,
            lambda news: None,
            work.output_stream(tokenizer(), ()),
            sampling_state(work, self.model),
            self.pool.allocate(work.request_id, work.max_total_tokens, generation=work.epoch),
        )

    async def ends(self) -> None:
        self.pool.release("r")
        await assert_empties(self.pool)


@pytest.fixture
async def running():
    async with running_store() as running:
        yield running
        await running.freed()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
async def test_what_was_stored_is_placed(running, length):
    work = make_order(prompt=prompt_of(length))
    handle = await store_kv(running, work)
    bench = Bench(running, work, handle)
    started = await bench.restorer.restore(bench.sequence)
    assert started.kv_read_ns > 0
    assert started.kv_wait_ns > 0
    reference = make_model(16)
    num_blocks = -(-length // BLOCK_SIZE)
    source = await store_kv(running, replace(work, epoch=1))
    other = Bench(running, replace(work, epoch=1), source)
    await other.restorer.restore(other.sequence)
    found = bench.model.cache.read_blocks(bench.sequence.blocks[:num_blocks])
    reference.forward(reference.batch([SequenceRows(work.token_ids[:-1], 0, range(num_blocks))]))
    assert found.equal(reference.cache.read_blocks(range(num_blocks)))
    assert found.equal(other.model.cache.read_blocks(other.sequence.blocks[:num_blocks]))
    await bench.restorer.give_up_stored(bench.sequence)
    await other.restorer.give_up_stored(other.sequence)
    await bench.ends()


@pytest.mark.parametrize("num_cancels", [1, 3])
async def test_a_cancelled_read_keeps_its_blocks_until_the_last_write_has_returned(running, num_cancels):
    gate = Gate()
    work = make_order(prompt=prompt_of(60))
    bench = Bench(running, work, await store_kv(running, work), write_blocks=gate)
    task = asyncio.ensure_future(bench.restorer.restore(bench.sequence))
    gate.let()
    await until(lambda: gate.entered == 2)
    bench.pool.release("r")
    for _ in range(num_cancels):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    assert [owner.holds for owner in bench.pool.audit().owners] == [(HOLD,)]
    assert bench.pool.num_free < 16
    gate.let()
    await asyncio.wait({task})
    assert task.cancelled()
    assert gate.entered == 2
    await assert_empties(bench.pool)
    await bench.restorer.give_up_stored(bench.sequence)


async def test_a_block_that_fails_its_digest_is_never_used(running):
    work = make_order(prompt=prompt_of(60))
    handle = await store_kv(running, work)
    (obj,) = running.store._books.objects.values()
    backend = running.store._backend
    message = bytearray(backend.get(obj.key, 3))
    message[-5] ^= 1
    get = backend.get
    backend.get = lambda key, index: bytes(message) if index == 3 else get(key, index)
    bench = Bench(running, work, handle)
    with pytest.raises(DataLoss):
        await bench.restorer.restore(bench.sequence)
    assert running.client.verify_failures == 1
    await bench.ends()
    await bench.restorer.give_up_stored(bench.sequence)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"store_epoch": 1}, "STALE_HANDLE"),
        ({"epoch": 7}, "STALE_HANDLE"),
        ({"num_bytes": 64}, "NO_SUCH_HANDLE"),
        ({"num_tokens": 59}, "STALE_HANDLE"),
        ({"num_tokens": 61}, "STALE_HANDLE"),
        ({"object_id": bytes(16)}, "STALE_HANDLE"),
        ({"fingerprint": bytes(32)}, "FINGERPRINT_MISMATCH"),
    ],
)
async def test_a_handle_of_something_else_is_refused(running, change, reason):
    work = make_order(prompt=prompt_of(60))
    handle = await store_kv(running, work)
    bench = Bench(running, work, replace(handle, **change))
    with pytest.raises(TandemError) as caught:
        await bench.restorer.restore(bench.sequence)
    assert caught.value.reason == reason
    await bench.ends()
    await running.client.release(handle)


async def test_kv_of_fewer_tokens_never_becomes_wrong_text(running):
    """A real object, sealed and sound, of another length than the request's."""
    work = make_order(prompt=prompt_of(60))
    shorter = await store_kv(running, make_order(prompt=prompt_of(40)))
    bench = Bench(running, work, shorter)
    with pytest.raises(FailedPrecondition):
        await bench.restorer.restore(bench.sequence)
    await bench.ends()
    await running.client.release(shorter)


async def test_an_object_that_was_given_up_is_stale(running):
    work = make_order()
    handle = await store_kv(running, work)
    await running.client.release(handle)
    bench = Bench(running, work, handle)
    with pytest.raises(FailedPrecondition):
        await bench.restorer.restore(bench.sequence)
    await bench.ends()


async def test_a_store_that_is_gone_is_store_down_and_giving_up_is_harmless():
    async with running_store() as running:
        work = make_order()
        bench = Bench(running, work, await store_kv(running, work))
        await running.client.release(bench.sequence.handle)
    with pytest.raises(TandemError) as caught:
        await bench.restorer.restore(bench.sequence)
    assert caught.value.reason == "STORE_DOWN"
    await bench.restorer.give_up_stored(bench.sequence)
    await bench.ends()


async def test_a_good_read_ends_its_lease_and_giving_up_frees_the_object(running):
    work = make_order()
    bench = Bench(running, work, await store_kv(running, work))
    await bench.restorer.restore(bench.sequence)
    await until(lambda: running.store.stat(bench.sequence.handle).num_leases == 0)
    assert running.store.audit().owned, "another attempt could still read it"
    await bench.restorer.give_up_stored(bench.sequence)
    await running.freed()
    await bench.ends()


async def test_an_object_in_another_codec_than_agreed_is_not_placed(running):
    work = make_order(prompt=prompt_of(20))
    bench = Bench(running, work, await store_kv(running, work))
    agreed = KvRestorer(running.client, bench.model.cache, bench.pool, codec="int8")
    with pytest.raises(FailedPrecondition, match="FINGERPRINT_MISMATCH"):
        await agreed.restore(bench.sequence)
    open_to_all = KvRestorer(running.client, bench.model.cache, bench.pool, codec="auto")
    await open_to_all.restore(bench.sequence)
    await open_to_all.give_up_stored(bench.sequence)
    await bench.ends()
