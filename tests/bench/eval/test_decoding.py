"""What experiments are made of: arms that decode, pairs, perplexity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bench.eval.decoding import Arm, measure, num_runs, per_round
from bench.eval.experiment import Settings
from bench.eval.models import pair_of, target_of
from bench.eval.perplexity import read
from bench.inflate import Pair
from bench.speculation.rig import Rig, Run, Setup
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.sampling import SamplingParams
from tests.checkpoints import tiny_llama

PROMPTS = [tuple((7 * start + 3 * i * i) % 251 for i in range(20)) for start in range(5)]
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


def test_every_arm_decodes_every_sample_and_rounds_add_up(pair) -> None:
    rig = Rig(pair, Setup(), 3, 40, 1)
    arms = {"plain": Arm.of(rig, 0, 0.0), "3": Arm.of(rig, 3, 0.0)}
    calls: list[int] = []
    found = measure(arms, PROMPTS, 1, GREEDY, 2, lambda: calls.append(1))
    assert len(calls) == num_runs(2, 5, 1, 2) == 2 * (1 + 2)
    plain, drafted = found["plain"].total, found["3"].total
    assert [len(output) for output in plain.outputs] == [8] * 5
    assert drafted.outputs == plain.outputs
    assert drafted.num_drafted == sum(run.num_drafted for run in found["3"].runs) > 0
    assert 0 < found["plain"].utilization < 1.5


def test_a_total_of_no_runs_is_nothing() -> None:
    assert Run.total([]) == Run()


@given(st.integers(1, 600), st.integers(1, 32), st.integers(1, 9))
def test_rounds_are_whole_batches_that_fit_memory(count, batch, rounds) -> None:
    size = per_round(count, batch, rounds)
    assert size % batch == 0
    assert batch <= size <= max(batch, 32)


def test_half_a_pair_is_refused(pair) -> None:
    with pytest.raises(ConfigError, match="name its --target too"):
        pair_of(Settings(draft=pair.draft))
    with pytest.raises(ConfigError, match="name a --draft"):
        pair_of(Settings(target=pair.target))
    assert target_of(Settings(target=pair.target)).pair == Pair(pair.target, pair.target)


def test_perplexity_is_that_of_windows_scored_by_transformers() -> None:
    """The recipe of its documentation: labels of tokens that were scored before are left out."""
    tokens = torch.tensor([(5 * i * i + i) % 250 for i in range(1100)])
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32).eval()
    nats, scored = 0.0, 1
    for begin in range(0, 1100, 256):
        end = min(begin + 512, 1100)
        with torch.inference_mode():
            logits = reference(tokens[None, begin:end]).logits[0]
        new = range(scored, end)
        nats += torch.nn.functional.cross_entropy(
            logits[scored - 1 - begin : end - 1 - begin], tokens[new.start : new.stop], reduction="sum"
        ).item()
        scored = end
        if end == 1100:
            break
    model = ModelRunner.load(tiny_llama(), num_blocks=32, block_size=16)
    found = read(model, tokens.tolist())
    assert found.perplexity == pytest.approx(math.exp(nats / 1099), rel=1e-4)
    assert len(found.choices) == 1099
    assert found.agreement(found) == 1
