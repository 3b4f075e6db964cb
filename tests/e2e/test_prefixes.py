"""Tokens do not depend on what of a prompt was cached, in which backend, or on what became of it."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests import redis_server
from tests.e2e.harness import MIB, ask, complete, config, quiesce, running, store_of, until
from tests.kvstore.backends import SCHEMES, medium

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_TOKENS = 8
PIECE = 32  # tokens


def caching(prefix_bytes=4 * MIB, url="memory://", **parts):
    kvstore = {"prefix_tokens": PIECE, "url": url}
    return config(cache={"prefix_bytes": prefix_bytes}, kvstore=kvstore, **parts)


def conversation(num_turns: int = 4, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts that each begin with the one before."""
    rng = random.Random(seed)
    ids = [rng.randrange(3, 200) for _ in range(70)]
    prompts = []
    for _ in range(num_turns):
        prompts.append(tuple(ids))
        ids += [rng.randrange(3, 200) for _ in range(rng.choice((1, 32, 45)))]
    return prompts


async def say(cluster, prompts, **sampling):
    """Tokens of each prompt, and how many of its own were cached; the next waits for what it published."""
    results = []
    for prompt in prompts:
        results.append(await complete(cluster, ask(prompt, max_tokens=NUM_TOKENS, **sampling)))
        await until(lambda: not any(server.worker.num_running for server in cluster.prefills))
    return [result.token_ids for result in results], [result.finished.usage.cached for result in results]


def expected_cached(prompts):
    seen, expected = set(), []
    for prompt in prompts:
        pieces = [prompt[:end] for end in range(PIECE, len(prompt) + 1, PIECE)]
        usable = [len(piece) for piece in pieces if piece in seen and len(piece) < len(prompt)]
        expected.append(max(usable, default=0))
        seen.update(pieces)
    return expected


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_cached_beginnings_change_no_token(scheme, tmp_path, cluster):
    prompts = [*conversation(), *conversation(seed=1), *conversation()]
    with medium(scheme, tmp_path) as place:
        async with running(caching(url=place.url, prefill={"token_budget": 48})) as other:
            tokens, cached = await say(other, prompts)
            assert cached == expected_cached(prompts)
            assert sum(cached) > sum(map(len, prompts)) / 2
            assert tokens == (await say(cluster, prompts))[0]
            assert store_of(other).counters.prefix_hits == sum(cached) / PIECE + _looked_up_again(prompts)


async def test_sampled_tokens_and_logprobs_are_the_same_too(cluster):
    prompts = conversation() * 2
    sampling = {"temperature": 1.0, "seed": 7, "logprobs": 2}
    async with running(caching()) as other:
        cold = [await complete(cluster, ask(prompt, max_tokens=NUM_TOKENS, **sampling)) for prompt in prompts]
        tokens, cached = await say(other, prompts, **sampling)
        assert cached[-1] > 0
        assert tokens == [result.token_ids for result in cold]


@pytest.mark.slow
async def test_many_at_once_and_too_little_room(cluster):
    """Room for some of the pieces only, so that they are evicted while others look for them."""
    prompts = [prompt for seed in range(6) for prompt in conversation(seed=seed)]
    async with running(caching(prefix_bytes=MIB // 4), num_prefill=2) as other:
        for _ in range(2):
            sent = (complete(other, ask(prompt, max_tokens=NUM_TOKENS)) for prompt in prompts)
            results = await asyncio.gather(*sent)
            assert [result.token_ids for result in results] == (await say(cluster, prompts))[0]
        assert store_of(other).counters.evicted > 0
        store_of(other).check_integrity()


async def test_cached_pieces_that_are_corrupt_are_computed(cluster):
    prompts = conversation(2)
    async with running(caching()) as other:
        wanted, _ = await say(other, prompts)
        _, sound = await say(other, prompts)
        pieces = store_of(other)._backend._messages.values()
        for messages in pieces:
            messages[0] = messages[0][:-1] + bytes([messages[0][-1] ^ 1])
        num_damaged = len(pieces)
        assert await say(other, prompts[1:]) == (wanted[1:], [0])
        # All of them have been given up at once, and kept anew.
        assert other.prefills[0].worker._prefixes.report.num_failures == num_damaged > 1
        assert await say(other, prompts) == (wanted, sound)
        assert wanted == (await say(cluster, prompts))[0]


@pytest.mark.redis
async def test_prefixes_that_redis_lost_are_computed(tmp_path, cluster):
    prompts = conversation(2) * 2
    with redis_server.running(tmp_path) as server:
        async with running(caching(url=server.url)) as other:
            await say(other, prompts[:2])
            with server.client() as client:
                client.flushall()
            tokens, cached = await say(other, prompts[2:])
            assert cached == [0, 0]
            assert tokens == (await say(cluster, prompts[2:]))[0]


async def test_cancelled_prompts_with_cached_beginnings_leave_nothing():
    prompts = conversation(6)
    async with running(caching()) as other:
        await say(other, prompts)
        calls = [asyncio.create_task(complete(other, ask(prompt, max_tokens=200))) for prompt in prompts * 3]
        for number, call in enumerate(calls):
            await asyncio.sleep(0.003 * (number % 4))
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await quiesce(other)
        assert (await say(other, prompts[-1:]))[1] != [0]


def _looked_up_again(prompts) -> int:
    """Pieces that were found once more when a prompt was published: all that were there by then."""
    seen, found = set(), 0
    for prompt in prompts:
        pieces = [prompt[:end] for end in range(PIECE, len(prompt) + 1, PIECE)]
        found += sum(piece in seen for piece in pieces)
        seen.update(pieces)
    return found
