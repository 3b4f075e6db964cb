"""Tokens do not depend on where KV is kept, and the medium is empty when nothing runs."""

from __future__ import annotations

import asyncio

import pytest

from tests import redis_server
from tests.e2e.harness import (
    ask,
    complete,
    config,
    failure,
    open_stream,
    quiesce,
    read_all,
    running,
    store_of,
)
from tests.e2e.reference import mixed_prompts
from tests.kvstore.backends import SCHEMES, medium

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPTS = mixed_prompts(12, longest=150)
NUM_TOKENS = 8


async def tokens_of(cluster):
    sent = (complete(cluster, ask(prompt, max_tokens=NUM_TOKENS)) for prompt in PROMPTS)
    return [result.token_ids for result in await asyncio.gather(*sent)]


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_tokens_are_the_same_with_every_backend(scheme, tmp_path, cluster):
    with medium(scheme, tmp_path) as place:
        settings = config(kvstore={"url": place.url, "chunk_bytes": 4096}, prefill={"token_budget": 24})
        async with running(settings) as other:
            assert await tokens_of(other) == await tokens_of(cluster)
            await quiesce(other)
            assert place.contents(store_of(other)._backend) == []


async def test_tokens_are_the_same_with_tiers(tmp_path, cluster):
    url = f"memory://?bytes={64 << 10}+shm://?bytes={64 << 10}+disk://{tmp_path}"
    async with running(config(kvstore={"url": url})) as other:
        assert await tokens_of(other) == await tokens_of(cluster)
        assert store_of(other)._backend.num_demoted > 0


@pytest.mark.redis
async def test_requests_go_on_without_redis(tmp_path):
    """C1: what cannot be handed off is computed where it is decoded, a request under way too."""
    with redis_server.running(tmp_path) as server:
        async with running(config(kvstore={"url": server.url})) as cluster:
            before = await complete(cluster, ask(PROMPTS[0], max_tokens=NUM_TOKENS))
            server.kill()
            away = await complete(cluster, ask(PROMPTS[0], max_tokens=NUM_TOKENS))
            server.start()
            after = await complete(cluster, ask(PROMPTS[0], max_tokens=NUM_TOKENS))
    assert before.token_ids == away.token_ids == after.token_ids
    places = [result.finished.timings.placement for result in (before, away, after)]
    assert places == ["split/always", "local/store-down", "split/always"]


@pytest.mark.redis
async def test_without_the_fallback_requests_end_while_redis_is_away_and_work_when_it_is_back(tmp_path):
    settings = {"router": {"store_fallback": False, "default_timeout_s": 20.0}}
    with redis_server.running(tmp_path) as server:
        async with running(config(kvstore={"url": server.url}, **settings)) as cluster:
            before = await complete(cluster, ask(PROMPTS[0], max_tokens=NUM_TOKENS))
            server.kill()
            away = await failure(read_all(open_stream(cluster, ask(PROMPTS[0], max_tokens=NUM_TOKENS))))
            server.start()
            after = await complete(cluster, ask(PROMPTS[0], max_tokens=NUM_TOKENS))
    assert away.reason in ("STORE_DOWN", "STREAM_BROKEN")  # the latter once the first token was sent
    assert before.token_ids == after.token_ids
