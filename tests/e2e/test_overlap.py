"""KV that leaves and arrives while the prompt is still being computed: the same tokens, and nothing left."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from decode_worker.prefetch import Prefetches
from prefill_worker.handoff import HandoffContext
from tests.e2e.harness import (
    BLOCK_BYTES,
    ask,
    complete,
    config,
    corrupt_reads,
    crash,
    failure,
    open_stream,
    quiesce,
    running,
    slow_runs,
    store_of,
    until,
)

BUDGET = 64
LENGTHS = (1, 30, 64, 65, 150, 257, 400)
MORE = {"max_tokens": 12, "ignore_eos": True}


@asynccontextmanager
async def overlapping(overlap_bytes=BLOCK_BYTES, num_prefill=1, **parts):
    kvstore = {"overlap_bytes": overlap_bytes, "chunk_bytes": 4096, **parts.pop("kvstore", {})}
    settings = config(prefill={"token_budget": BUDGET}, kvstore=kvstore, **parts)
    async with running(settings, num_prefill) as cluster:
        await complete(cluster, ask("x", **MORE))  # from now on the workers know what may be followed
        yield cluster


@pytest.fixture
def prefetched(monkeypatch):
    """What decode workers were given of what they had prefetched: whether it was whole."""
    found = []
    join = Prefetches._join

    async def watched(self, work):
        prefetch = await join(self, work)
        found.append(prefetch is not None and prefetch.handle is not None)
        return prefetch

    monkeypatch.setattr(Prefetches, "_join", watched)
    return found


async def tokens_of(cluster, length):
    return (await complete(cluster, ask(prompt_of(length), **MORE))).token_ids


def prompt_of(length):
    return ("abcdefg" * length)[:length]


@pytest.mark.parametrize("is_beside", [True, False])
@pytest.mark.parametrize("url", ["memory://", "shm://"])
async def test_the_tokens_are_those_without_overlap(prefetched, monkeypatch, url, is_beside):
    async with overlapping(0) as cluster, slow_each_run(cluster):
        expected = [await tokens_of(cluster, length) for length in LENGTHS]
    of = HandoffContext.of
    monkeypatch.setattr(HandoffContext, "of", lambda *args: replace(of(*args), is_beside=is_beside))
    async with overlapping(kvstore={"url": url}) as cluster, slow_each_run(cluster):
        prefetched.clear()
        assert [await tokens_of(cluster, length) for length in LENGTHS] == expected
        assert prefetched[-1], "the longest prompt was fetched while it was computed"
        together = await asyncio.gather(*(tokens_of(cluster, length) for length in LENGTHS))
        assert together == expected


@pytest.mark.parametrize(("num_blocks", "is_early"), [(2, False), (4, True)])
async def test_only_a_chunk_with_much_kv_leaves_while_it_is_computed(prefetched, num_blocks, is_early):
    async with overlapping(4 * BLOCK_BYTES) as cluster, slow_each_run(cluster):
        await tokens_of(cluster, 16 * num_blocks)
        assert prefetched[-1] is is_early


@asynccontextmanager
async def slow_each_run(cluster):
    """Time for the transfer to overlap with, on however fast a machine."""
    with slow_runs(cluster.prefills[0], 0.03):
        yield


async def test_the_share_that_was_hidden_is_reported():
    async with overlapping() as cluster, slow_each_run(cluster):
        shares = [(await complete(cluster, ask("x" * 400, **MORE))).finished.timings for _ in range(3)]
        short = (await complete(cluster, ask("x", **MORE))).finished.timings
    assert all(timings.transfer_ms > 0 for timings in shares)
    assert all(0 <= timings.transfer_hidden <= 1 for timings in (*shares, short))
    assert max(timings.transfer_hidden for timings in shares) > 0


@pytest.mark.parametrize("after_s", [0.01, 0.05, 0.1, 0.15])
async def test_a_client_that_leaves_in_the_middle(after_s):
    async with overlapping() as cluster, slow_each_run(cluster):
        call = open_stream(cluster, ask("x" * 400, **MORE))
        await asyncio.sleep(after_s)
        call.cancel()
        await quiesce(cluster)


async def test_a_prompt_that_ends_with_its_first_token_gives_its_blocks_back():
    async with overlapping() as cluster, slow_each_run(cluster):
        [first, *_] = await tokens_of(cluster, 300)
        result = await complete(cluster, ask(prompt_of(300), max_tokens=12, stop_token_ids=[first]))
        assert result.reason == "STOP"
        await quiesce(cluster)


async def test_a_prefill_worker_that_dies_in_the_middle():
    async with overlapping(num_prefill=2) as cluster:
        expected = await tokens_of(cluster, 300)
        await quiesce(cluster)
        with slow_runs(cluster.prefills[0], 0.3), slow_runs(cluster.prefills[1], 0.3):
            sending = asyncio.create_task(complete(cluster, ask(prompt_of(300), **MORE)))
            await until(lambda: store_of(cluster).audit().owned)
            busy = next(p for p in cluster.prefills if p.worker.num_running)
            await crash(busy)
            assert (await sending).token_ids == expected


async def test_bytes_that_are_damaged_on_the_way_are_fetched_again(prefetched):
    async with overlapping() as cluster, slow_each_run(cluster):
        expected = await tokens_of(cluster, 300)
        with corrupt_reads(cluster, 1):
            assert await tokens_of(cluster, 300) == expected
        assert len(prefetched) >= 3


async def test_a_deadline_in_the_middle():
    async with overlapping() as cluster, slow_each_run(cluster):
        failed = await failure(complete(cluster, ask("x" * 400, timeout_s=0.15, **MORE)))
        assert failed.code == grpc.StatusCode.DEADLINE_EXCEEDED.name
        await quiesce(cluster)


async def test_a_decode_worker_without_room_leaves_it_to_later(prefetched):
    """The order to prefetch is no promise: the request waits for its blocks in the usual way."""
    async with overlapping() as cluster, slow_each_run(cluster):
        [decode] = cluster.decodes
        expected = await tokens_of(cluster, 300)
        allocate, pool = decode.worker._pool.allocate, decode.worker._pool
        refused = []

        def refuse_once(*args, **kwargs):
            if not refused:
                refused.append(1)
                return None
            return allocate(*args, **kwargs)

        pool.allocate = refuse_once
        try:
            assert await tokens_of(cluster, 300) == expected
        finally:
            del pool.allocate
        assert refused
