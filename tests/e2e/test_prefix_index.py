"""Two services that share a prefix index: what one has computed the other fetches, and no token changes."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tandem.config import IndexConfig
from tests import redis_server
from tests.e2e.harness import MIB, config, running, store_of, until
from tests.e2e.test_prefixes import PIECE, conversation, say

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.redis]


@asynccontextmanager
async def services(tmp_path, count: int = 2):
    """Each with its own router, store and workers, and the Redis behind them."""
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o600)
    with redis_server.running(tmp_path) as server:
        kvstore = {
            "prefix_tokens": PIECE,
            "sweep_s": 0.02,
            "index": IndexConfig(url=server.url, key_file=key),
        }
        settings = config(cache={"prefix_bytes": 4 * MIB}, kvstore=kvstore)
        async with AsyncExitStack() as stack:
            started = [await stack.enter_async_context(running(settings)) for _ in range(count)]
            yield server, *started


def report(cluster):
    return cluster.prefills[0].worker._prefixes.report


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
