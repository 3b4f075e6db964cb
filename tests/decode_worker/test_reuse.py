"""Blocks of ended sequences: who finds them, what is computed behind them, and what is never kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decode_worker.reuse import BlockNames, Reuse
from tandem.errors import Internal
from tandem.prefix_usage import PrefixReport
from tests.decode_worker.rig import decoding, make_order, tokens_of
from tests.serving import BLOCK_SIZE, NAN, greedy, make_work, prompt_of

PROMPT = prompt_of(50)


class Rows:
    """Counts the rows of each forward."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, forward, batch):
        logits = forward(batch)
        self.counts.append(batch.num_rows)
        return logits


@pytest.fixture
def report():
    return PrefixReport()


@pytest.fixture
def reuse(report):
    return Reuse(names=BlockNames(BLOCK_SIZE, report))


async def say(rig, name, prompt, tenant="", **options):
    """A prompt that comes without KV, to its end."""
    rig.worker.start(replace(make_work(name, prompt, **options), tenant=tenant), None, rig.client.emit)
    deltas = []
    while not deltas or deltas[-1].finish is None:
        deltas.append(await rig.client.next(name))
    return tokens_of(deltas)


async def test_a_prompt_without_kv_is_computed_behind_what_is_kept(reuse, report):
    rows = Rows()
    async with decoding(forward=rows, reuse=reuse, prefill_tokens=128) as rig:
        answer = await say(rig, "first", PROMPT, max_tokens=20)
        assert answer == greedy(PROMPT, 20)
        turn = (*PROMPT, *answer, *prompt_of(9, start=100))
        rows.counts.clear()
        assert await say(rig, "second", turn, max_tokens=5) == greedy(turn, 5)
    kept = (len(PROMPT) + 19) // BLOCK_SIZE * BLOCK_SIZE
    assert report.num_tokens == kept
    assert sum(rows.counts) == len(turn) - kept + 4


async def test_kv_of_the_store_is_placed_behind_what_is_kept(reuse, report):
    async with decoding(reuse=reuse) as rig:
        for number in range(3):
            await rig.start(make_order(f"r{number}", PROMPT, max_tokens=12))
            assert tokens_of(await rig.client.all(f"r{number}")) == greedy(PROMPT, 12)[1:]
    assert (report.num_prompts, report.num_hits) == (3, 2)
    assert report.num_tokens == 2 * (len(PROMPT) // BLOCK_SIZE) * BLOCK_SIZE


async def test_what_one_tenant_left_another_does_not_find(reuse, report):
    async with decoding(reuse=reuse) as rig:
        for tenant in ("a", "b"):
            await say(rig, f"of-{tenant}", PROMPT, tenant, max_tokens=4)
        assert report.num_hits == 0
        await say(rig, "again", PROMPT, "a", max_tokens=4)
        assert report.num_hits == 1


async def test_a_sequence_that_failed_leaves_nothing_to_be_found(reuse, report):
    def spoil(forward, batch):
        return forward(batch) + (NAN if report.num_prompts == 1 else 0.0)

    async with decoding(forward=spoil, reuse=reuse) as rig:
        rig.worker.start(make_work("bad", PROMPT), None, rig.client.emit)
        assert isinstance(await rig.client.error("bad"), Internal)
        assert await say(rig, "good", PROMPT, max_tokens=4) == greedy(PROMPT, 4)
        assert report.num_hits == 0
