"""Two services that share a prefix index: what one has computed the other fetches, and no token changes."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tandem.config import IndexConfig
from tests import redis_server
from tests.e2e.harness import (
    MIB,
    PATIENCE_S,
    ask,
    complete,
    config,
    corrupt_reads,
    crash,
    running,
    slow_steps,
    store_of,
    until,
)
from tests.e2e.test_prefixes import PIECE, conversation, say

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.redis]


@asynccontextmanager
async def services(tmp_path, *, places: tuple[str, ...] = ("always", "always"), num_decode: int = 1):
    """Each with its own router, store and workers, and the Redis behind them. `places` says of each whether
    prompts are split."""
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o600)
    with redis_server.running(tmp_path) as server:
        kvstore = {
            "prefix_tokens": PIECE,
            "sweep_s": 0.02,
            "index": IndexConfig(url=server.url, key_file=key),
        }
        async with AsyncExitStack() as stack:
            started = []
            for place in places:
                router = {"disaggregate": place, "default_timeout_s": PATIENCE_S}
                settings = config(cache={"prefix_bytes": 4 * MIB}, kvstore=kvstore, router=router)
                started.append(await stack.enter_async_context(running(settings, 1, num_decode)))
            yield server, *started


def report(cluster):
    return cluster.prefills[0].worker._prefixes.report


def decode_report(server):
    return server._restorer._beginnings._reader.report


async def told(cluster) -> None:
    """Until the index knows all that the store has."""
    announcer, store = cluster.store._announcer, store_of(cluster)
    await until(lambda: not announcer._is_behind and not announcer._journal._changed)
    assert announcer.index.report.num_announced > 0
    assert store.prefixes.salt("")


async def test_what_one_computed_the_other_fetches(tmp_path, cluster):
    prompts = conversation()
    expected = (await say(cluster, prompts))[0]
    async with services(tmp_path) as (_, one, other):
        assert (await say(one, prompts))[0] == expected
        await told(one)
        tokens, cached = await say(other, prompts)
        assert tokens == expected
        assert cached == [(len(prompt) - 1) // PIECE * PIECE for prompt in prompts]
        assert report(other).num_elsewhere > 0
        assert report(other).num_failures == 0
        elsewhere = report(other).num_elsewhere
        assert (await say(other, prompts))[1] == cached
        assert report(other).num_elsewhere == elsewhere  # what was fetched once is here now


async def test_a_store_that_has_lost_it_is_a_miss_and_is_not_asked_again(tmp_path, cluster):
    prompts = conversation(1)
    async with services(tmp_path) as (_, one, other):
        await say(one, prompts)
        await told(one)
        announcer = one.store._announcer
        announcer._task.cancel()  # a store that is gone tells nobody
        await asyncio.wait({announcer._task})
        store = store_of(one)
        for obj in list(store._books.objects.values()):
            store._books.give_up(obj)
        assert await say(other, prompts) == ((await say(cluster, prompts))[0], [0])
        assert report(other).index.num_stale > 0
        assert report(other).num_failures == 0


async def test_without_redis_prompts_are_computed(tmp_path, cluster):
    prompts = conversation(2)
    async with services(tmp_path) as (server, one, other):
        await say(one, prompts)
        await told(one)
        server.hold_still()
        tokens, cached = await say(other, prompts)
        server.kill()
        again, own = await say(other, prompts)
        assert tokens == again == (await say(cluster, prompts))[0]
        assert cached[0] == 0
        assert own == [(len(prompt) - 1) // PIECE * PIECE for prompt in prompts]  # from its own store
        assert report(other).index.num_failures > 0


async def test_a_decode_worker_that_reads_prompts_itself_asks_too(tmp_path, cluster):
    prompts = conversation()
    expected = (await say(cluster, prompts))[0]
    async with services(tmp_path, places=("always", "never")) as (_, one, other):
        await say(one, prompts)
        await told(one)
        tokens, cached = await say(other, prompts)
        assert tokens == expected
        assert cached == [(len(prompt) - 1) // PIECE * PIECE for prompt in prompts]
        found = decode_report(other.decodes[0])
        assert found.num_tokens == sum(cached) == PIECE * found.num_elsewhere
        assert (found.num_prompts, found.num_hits, found.num_failures) == (len(prompts), len(prompts), 0)
        assert found.restore_s > 0
        assert report(other).num_prompts == 0, "nothing was split"


async def test_a_request_that_resumes_on_another_decode_worker_starts_from_another_store(tmp_path, cluster):
    prompt = ask(conversation()[-1], max_tokens=40, ignore_eos=True)
    expected = (await complete(cluster, prompt)).token_ids
    async with services(tmp_path, places=("always", "never"), num_decode=2) as (_, one, other):
        assert (await complete(one, prompt)).token_ids == expected
        await told(one)
        with slow_steps(other.decodes[0]), slow_steps(other.decodes[1]):
            sending = asyncio.create_task(complete(other, prompt))
            await until(lambda: any(server.worker.num_running for server in other.decodes))
            busy, spare = sorted(other.decodes, key=lambda server: -server.worker.num_running)
            assert decode_report(spare).num_prompts == 0
            await crash(busy)
            assert (await sending).token_ids == expected
        assert decode_report(spare).num_elsewhere > 0


async def test_without_redis_decode_workers_compute_what_they_lack(tmp_path, cluster):
    prompts = conversation(2)
    async with services(tmp_path, places=("always", "never")) as (server, one, other):
        await say(one, prompts)
        await told(one)
        server.hold_still()
        tokens, cached = await say(other, prompts)
        server.kill()
        assert tokens == (await say(other, prompts))[0] == (await say(cluster, prompts))[0]
        assert cached == [0] * len(prompts)
        assert decode_report(other.decodes[0]).index.num_failures > 0


async def test_what_a_decode_worker_gets_corrupt_it_computes(tmp_path, cluster):
    prompts = conversation(1)
    async with services(tmp_path, places=("always", "never")) as (_, one, other):
        await say(one, prompts)
        await told(one)
        num_pieces = (len(prompts[0]) - 1) // PIECE
        with corrupt_reads(one, times=num_pieces) as flips:
            tokens, cached = await say(other, prompts)
        assert len(flips) == num_pieces == 2
        assert cached == [0]
        assert tokens == (await say(cluster, prompts))[0]
