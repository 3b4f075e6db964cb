"""The service says, token for token, what transformers says about the same checkpoint."""

from __future__ import annotations

import asyncio

import pytest

from tests.e2e.harness import ask, complete, config, generate, quiesce, running
from tests.e2e.reference import greedy, mixed_prompts, near_ties

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPTS = mixed_prompts(40, longest=150)
NUM_TOKENS = 20


@pytest.fixture(scope="module", autouse=True)
def _reference():
    """Before any service runs: on the same event loop it would hold up heartbeats and releases."""
    for prompt in PROMPTS:
        greedy(prompt, NUM_TOKENS)


async def send_all(cluster):
    return await asyncio.gather(
        *(complete(cluster, ask(prompt, max_tokens=NUM_TOKENS)) for prompt in PROMPTS)
    )


def num_near_ties(results):
    return sum(
        near_ties(result.token_ids, prompt, NUM_TOKENS)
        for prompt, result in zip(PROMPTS, results, strict=True)
    )


async def test_forty_prompts_at_once_equal_transformers(cluster):
    results = await send_all(cluster)

    assert num_near_ties(results) <= 1
    assert max(len(result.token_ids) for result in results) == NUM_TOKENS
    await quiesce(cluster)


async def test_batch_mates_do_not_change_a_token(cluster):
    together = await send_all(cluster)
    alone = [await complete(cluster, ask(prompt, max_tokens=NUM_TOKENS)) for prompt in PROMPTS[::8]]

    assert [result.token_ids for result in alone] == [result.token_ids for result in together[::8]]
    await quiesce(cluster)


async def test_queueing_for_memory_does_not_change_a_token():
    async with running(config(prefill_blocks=12, decode_blocks=24, store_blocks=14)) as cluster:
        sending = asyncio.create_task(send_all(cluster))
        longest = 0
        while not sending.done():
            longest = max(longest, len(cluster.router.dispatcher.planner._queue))
            await asyncio.sleep(0.005)

        assert longest > 5, "nothing waited for memory"
        assert num_near_ties(await sending) <= 1


async def test_chunked_prompts_on_two_pairs_do_not_change_a_token():
    settings = config(prefill={"token_budget": 24}, kvstore={"chunk_bytes": 4096})
    async with running(settings, num_prefill=2, num_decode=2) as cluster:
        results = await send_all(cluster)

        assert num_near_ties(results) <= 1
        assert {result.admitted[0].prefill_worker for result in results} == {"prefill-0", "prefill-1"}
        assert {result.admitted[0].decode_worker for result in results} == {"decode-0", "decode-1"}


async def test_unary_and_stream_agree(cluster):
    streamed = await complete(cluster, ask(PROMPTS[7], max_tokens=NUM_TOKENS, logprobs=2))
    [completion] = (await generate(cluster, ask(PROMPTS[7], max_tokens=NUM_TOKENS, logprobs=2))).completions

    assert list(completion.token_ids) == streamed.token_ids
    assert completion.text == streamed.text
    assert list(completion.logprobs) == streamed.logprobs
    assert completion.finished.reason == streamed.finished.reason
    await quiesce(cluster)
