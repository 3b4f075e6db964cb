"""Blocks that decode workers keep: later requests share them, fetch only the rest, and say the same."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import replace

import pytest

from tests.checkpoints import save_llama
from tests.e2e.harness import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    MIB,
    ask,
    complete,
    config,
    corrupt_reads,
    quiesce,
    running,
    slow_steps,
    store_of,
    until,
)
from tests.e2e.test_publish import DRAFTS, NEXT, PROMPT, publishing

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A draft that knows nothing of the target: nearly all guesses are rejected."""
    return save_llama(tmp_path_factory.mktemp("draft") / "stranger", seed=5)


def keeping(draft="none", stranger=None, **parts):
    """Chunks of one block, so that every block which is not needed stays where it is."""
    cache, kvstore = {"keep_blocks": True}, {"chunk_bytes": BLOCK_BYTES}
    settings = publishing(draft, stranger, publish="prompt", **parts)
    return config(cache=cache, kvstore=kvstore, speculation=_fields(settings.speculation), **parts)


def _fields(section) -> dict:
    return {name: getattr(section, name) for name in section.__dataclass_fields__}


def report_of(cluster, number=0):
    return cluster.decodes[number].worker._restorer._report


async def say(cluster, prompt, max_tokens, **sampling):
    message = ask(prompt, max_tokens=max_tokens, **{"ignore_eos": True, "logprobs": 1} | sampling)
    result = await complete(cluster, message)
    await quiesce(cluster)
    return result


def whole_blocks(num_tokens: int) -> int:
    return num_tokens // BLOCK_SIZE


@pytest.mark.parametrize("token_budget", [1024, 48])  # KV is fetched at once, or as it is computed
@pytest.mark.parametrize("draft", DRAFTS)
async def test_the_next_turn_fetches_only_what_was_said_since(draft, token_budget, stranger, cluster):
    async with running(keeping(draft, stranger, prefill={"token_budget": token_budget})) as warm:
        for max_tokens in (10, 11, 12, 40):  # the last token's KV does not exist: before, on, behind a border
            prompt = (max_tokens, *PROMPT[1:])
            first = await say(warm, prompt, max_tokens)
            turn = (*prompt, *first.token_ids, *NEXT)
            bytes_before, tokens_before = report_of(warm).num_bytes, report_of(warm).num_tokens
            second = await say(warm, turn, 8)
            kept = whole_blocks(len(prompt) + max_tokens - 1)
            assert report_of(warm).num_tokens - tokens_before == kept * BLOCK_SIZE
            assert report_of(warm).num_bytes - bytes_before == kept * BLOCK_BYTES
            plain = await say(cluster, turn, 8)
            assert (second.token_ids, second.logprobs) == (plain.token_ids, plain.logprobs)
            assert first.token_ids == (await say(cluster, prompt, max_tokens)).token_ids


async def test_a_prompt_without_kv_is_computed_behind_what_is_kept(cluster):
    async with running(keeping(router={"disaggregate": "never"})) as warm:
        first = await say(warm, PROMPT, 40)
        turn = (*PROMPT, *first.token_ids, *NEXT)
        second = await say(warm, turn, 8)
        assert report_of(warm).num_tokens == whole_blocks(len(PROMPT) + 39) * BLOCK_SIZE
        assert second.token_ids == (await say(cluster, turn, 8)).token_ids


async def test_many_that_share_in_a_small_pool_say_what_they_would_alone(cluster):
    """Beginnings are shared while they are in use, evicted when others need room, and never written to."""
    rng = random.Random(1)
    systems = [tuple(rng.randrange(3, 200) for _ in range(48)) for _ in range(4)]
    prompts = [(*rng.choice(systems), *(rng.randrange(3, 200) for _ in range(20))) for _ in range(40)]
    expected = [(await complete(cluster, ask(p, max_tokens=24, ignore_eos=True))).token_ids for p in prompts]
    async with running(keeping(decode_blocks=24, prefill={"token_budget": 32})) as warm:
        sent = (complete(warm, ask(prompt, max_tokens=24, ignore_eos=True)) for prompt in prompts)
        results = await asyncio.gather(*sent)
        assert [result.token_ids for result in results] == expected
        assert report_of(warm).num_hits > 10


async def test_those_who_share_are_counted_once_and_may_leave_in_any_order():
    async with running(keeping()) as warm:
        await say(warm, PROMPT, 8)
        pool = warm.decodes[0].worker._pool
        with slow_steps(warm.decodes[0]):
            calls = [
                asyncio.create_task(complete(warm, ask(PROMPT, max_tokens=60, ignore_eos=True)))
                for _ in range(4)
            ]
            await until(lambda: warm.decodes[0].worker.num_running == 4)
            shared, each = whole_blocks(len(PROMPT)), -(-(len(PROMPT) + 60) // BLOCK_SIZE)
            assert pool.audit().owned == shared + 4 * (each - shared)
            pool.check_integrity()
            for call in calls[:2]:
                call.cancel()
            results = await asyncio.gather(*calls[2:])
        assert results[0].token_ids == results[1].token_ids
        await asyncio.gather(*calls[:2], return_exceptions=True)


async def test_kv_that_failed_its_check_is_never_kept(cluster):
    async with running(keeping()) as warm:
        with corrupt_reads(warm, 1) as flips:
            result = await say(warm, PROMPT, 20)
            assert flips
        assert report_of(warm).num_hits == 0
        assert result.token_ids == (await say(cluster, PROMPT, 20)).token_ids
        again = await say(warm, PROMPT, 20)
        assert (report_of(warm).num_hits, again.token_ids) == (1, result.token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["none", "twin"])
async def test_conversations_at_once_with_everything_on(draft, cluster):
    """Published answers, cached beginnings, kept blocks, two workers of each kind, little room, and some who
    leave: every answer is what it would be alone, and nothing is lost."""
    settings = keeping(draft, decode_blocks=40, prefill_blocks=40, prefill={"token_budget": 48})
    kvstore = replace(settings.kvstore, publish="all", prefix_tokens=32)
    settings = replace(settings, kvstore=kvstore, cache=replace(settings.cache, prefix_bytes=MIB // 2))

    async def talk(cluster, seed: int, leaves: bool) -> list[list[int]]:
        rng, ids, answers = random.Random(seed), [seed % 5 + 3] * 40, []
        for _ in range(4):
            ids += [rng.randrange(3, 200) for _ in range(rng.choice((1, 15, 30)))]
            asking = complete(cluster, ask(ids, max_tokens=24, ignore_eos=True))
            if leaves and rng.random() < 0.5:
                with suppress(TimeoutError):
                    await asyncio.wait_for(asking, rng.choice((0.01, 0.05, 0.2)))
                continue
            answers.append((await asking).token_ids)
            ids += answers[-1]
        return answers

    expected = [await talk(cluster, seed, leaves=False) for seed in range(10)]
    async with running(settings, num_prefill=2, num_decode=2) as warm:
        for _ in range(2):
            leaving = [talk(warm, seed, leaves=True) for seed in range(100, 106)]
            staying = [talk(warm, seed, leaves=False) for seed in range(10)]
            found = await asyncio.gather(*staying, *leaving)
            assert found[:10] == expected
        assert sum(report_of(warm, number).num_hits for number in (0, 1)) > 20
        assert store_of(warm).counters.prefix_hits > 20
