"""Prompts that are computed on the decode worker itself, between the steps of the others."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from decode_worker.local_prefill import LEAST_STALL_S as STALL_S
from decode_worker.local_prefill import LocalPrefill, stall_of
from tandem.config import ClusterConfig
from tandem.errors import DeadlineExceeded
from tandem.request import FinishReason
from tandem.token_cost import LEAST_CHUNK_TOKENS, TokenCost
from tests.decode_worker.rig import decoding, make_order, tokens_of
from tests.serving import NAN, BatchGate, Gate, greedy, prompt_of, until


@dataclass(eq=False)
class Prompt:
    """What the line reads of a sequence."""

    num_left: int = 150
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [0] * self.num_left


def order(name="r", length=20, **sampling):
    """A request none of whose tokens is computed."""
    return make_order(name, prompt_of(length), delivered=0, **sampling)


@pytest.mark.parametrize("length", [1, 15, 16, 31, 100])
@pytest.mark.parametrize("chunk", [1, 7, 128])
async def test_output_is_the_models_own(length, chunk):
    async with decoding(prefill_tokens=chunk) as rig:
        rig.worker.start(order(length=length, max_tokens=12), None, rig.client.emit)
        deltas = await rig.client.rest()
        assert tokens_of(deltas) == greedy(prompt_of(length), 12)
        assert deltas[-1].finish is FinishReason.LENGTH
        assert rig.store.counters.reserved == 0


@pytest.mark.parametrize("delivered", [1, 5, 11])
async def test_a_resumed_request_goes_on_where_it_was(delivered):
    async with decoding() as rig:
        rig.worker.start(make_order(delivered=delivered, max_tokens=12), None, rig.client.emit)
        assert tokens_of(await rig.client.rest()) == greedy(prompt_of(20), 12)[delivered:]


async def test_a_prompt_that_ends_with_its_first_token():
    async with decoding() as rig:
        rig.worker.start(order(max_tokens=1), None, rig.client.emit)
        [delta] = await rig.client.rest()
        assert (delta.token_ids, delta.finish) == (greedy(prompt_of(20), 1), FinishReason.LENGTH)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), chunk=st.integers(1, 40), data=st.data())
def test_any_mix_of_prompts_and_sequences(lengths, chunk, data):
    is_local = [data.draw(st.booleans()) for _ in lengths]

    async def run():
        async with decoding(128, prefill_tokens=chunk, max_batch=3) as rig:
            for index, (length, local) in enumerate(zip(lengths, is_local, strict=True)):
                if local:
                    rig.worker.start(order(f"r{index}", length, max_tokens=6), None, rig.client.emit)
                else:
                    await rig.start(make_order(f"r{index}", prompt_of(length), max_tokens=6))
            for index, (length, local) in enumerate(zip(lengths, is_local, strict=True)):
                deltas = await (rig.client.rest if local else rig.client.all)(f"r{index}")
                assert tokens_of(deltas) == greedy(prompt_of(length), 6)[0 if local else 1 :]

    asyncio.run(run())


async def test_running_sequences_get_a_step_between_two_chunks():
    gate = BatchGate()
    async with decoding(forward=gate, prefill_tokens=8) as rig:
        await rig.start(make_order("running", max_tokens=30))
        await rig.client.started("running")
        await until(lambda: gate.entered == 1)
        rig.worker.start(order("prompt", 30, max_tokens=3), None, rig.client.emit)
        await until(lambda: rig.worker._inbox)  # nothing but the step thread is to act from here on
        gate.open()
        assert tokens_of(await rig.client.rest("prompt")) == greedy(prompt_of(30), 3)
        await rig.client.rest("running")
    first = gate.sizes.index(8)
    assert gate.sizes[first : first + 8] == [8, 1, 8, 1, 8, 1, 6, 2]


async def test_who_joins_during_a_chunk_waits_for_no_other():
    gate = BatchGate()
    async with decoding(forward=gate, prefill_tokens=8) as rig:
        rig.worker.start(order("prompt", 30, max_tokens=3), None, rig.client.emit)
        await until(lambda: gate.entered == 1)
        await rig.start(make_order("joins", max_tokens=3))
        await rig.client.started("joins")
        gate.open()
        await rig.client.rest("joins")
        await rig.client.rest("prompt")
    assert gate.sizes[:3] == [8, 1, 8]


@pytest.mark.parametrize(
    ("token_s", "is_alone", "wanted"),
    [
        (0.0, False, 256),  # nothing is known yet
        (STALL_S / 100, False, 100),
        (STALL_S / 1000, False, 256),
        (STALL_S / 2, False, LEAST_CHUNK_TOKENS),
        (STALL_S / 2, True, 256),
    ],
    ids=["unknown", "as long as others may wait", "fast", "slow", "nobody waits"],
)
def test_a_chunk_is_what_others_can_wait_for(token_s, is_alone, wanted):
    cost = TokenCost()
    if token_s:
        cost.observe(100, 100 * token_s)
    line = LocalPrefill(None, 256, cost)
    for _ in range(3):
        line.join(Prompt())
    assert sum(len(rows.token_ids) for rows in line.next(is_alone=is_alone).values()) == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, LEAST_CHUNK_TOKENS),
        ({"router": {"itl_limit_s": 0.2505}}, 83),
        ({"router": {"itl_limit_s": 0.02}}, LEAST_CHUNK_TOKENS),
        ({"router": {"itl_limit_s": 0.25}, "decode": {"stall_s": 0.2}}, 200),
        ({"router": {"itl_limit_s": 2.0}}, 256),
    ],
)
def test_a_chunk_takes_a_third_of_the_gaps_that_are_asked_for(changes, wanted):
    cost = TokenCost()
    cost.observe(100, 0.1)
    line = LocalPrefill(None, 256, cost, stall_of(ClusterConfig.from_dict(changes)))
    line.join(Prompt(1000))
    [rows] = line.next(is_alone=False).values()
    assert len(rows.token_ids) == wanted


def test_who_has_the_least_left_is_next_and_who_is_late_every_second_time():
    cost = TokenCost()
    cost.observe(100, 100.0)
    line = LocalPrefill(None, 100, cost)
    long, short, shorter = prompts = Prompt(1000), Prompt(150), Prompt(60)
    for prompt in prompts:
        line.join(prompt)

    def chosen() -> list[tuple[Prompt, int]]:
        rows = line.next(is_alone=True)
        return [(prompt, len(of.token_ids)) for prompt, of in rows.items()]

    for _ in range(2):
        assert chosen() == [(shorter, 60), (short, 40)]
    for prompt in prompts:  # they are all late now
        line._line[prompt] = replace(line._line[prompt], since_s=-1e9)
    for _ in range(3):
        assert chosen() == [(long, 100)]
        assert chosen() == [(shorter, 60), (short, 40)]
    line.leave(lambda prompt: prompt is not long)
    for _ in range(3):
        assert chosen() == [(long, 100)]


def test_a_chunk_on_fewer_cores_is_shorter():
    cost = TokenCost()
    cost.num_cores = 2
    cost.observe(100, STALL_S / 2)
    line = LocalPrefill(None, 256, cost)
    line.join(Prompt(num_left=1000))
    for num_cores, wanted in ((2, 200), (1, 100)):
        [rows] = line.next(is_alone=False, num_cores=num_cores).values()
        assert len(rows.token_ids) == wanted


@pytest.mark.parametrize("is_late", [False, True])
async def test_who_leaves_between_two_chunks_frees_its_blocks(is_late):
    gate = Gate()
    async with decoding(forward=gate, prefill_tokens=2) as rig:
        work = order(length=40, max_tokens=5, **({"timeout_s": 1.0} if is_late else {}))
        sequence = rig.worker.start(work, None, rig.client.emit)
        await until(lambda: gate.entered == 1)
        gate.let()
        await until(lambda: gate.entered == 2)
        if is_late:
            await asyncio.sleep(work.time_left_s() + 0.01)
        else:
            rig.worker.cancel(sequence)
        gate.open()
        if is_late:
            assert isinstance(await rig.client.error(), DeadlineExceeded)
        await until(lambda: not rig.pool.audit().owned)


async def test_a_forward_that_raises_fails_only_its_prompts():
    def forward(call, batch):
        if batch.num_rows > 20:
            raise RuntimeError("secret")
        return call(batch)

    async with decoding(forward=forward) as rig:
        rig.worker.start(order("bad", 30), None, rig.client.emit)
        assert (await rig.client.error("bad")).reason == "BUG"
        rig.worker.start(order("good", 10, max_tokens=4), None, rig.client.emit)
        assert tokens_of(await rig.client.rest("good")) == greedy(prompt_of(10), 4)


async def test_a_prompt_without_usable_logits_is_said():
    def forward(call, batch):
        return call(batch) * NAN

    async with decoding(forward=forward) as rig:
        rig.worker.start(order(), None, rig.client.emit)
        assert (await rig.client.error()).reason == "NUMERICS"
