"""Sampled tokens have exactly the target's distribution, whatever the draft: Pearson's chi-square test.

Each case draws `NUM_DRAWS` pairs of tokens and compares them with the exact joint distribution, computed
from the target's logits alone. A right implementation fails a case with probability `FALSE_ALARM` over the
choice of seeds; with nine cases the whole file alarms falsely with probability below 0.1 %. Seeds are fixed.
"""

from __future__ import annotations

import time

import pytest
import torch

from decode_worker.drafts.model import ModelDraft
from decode_worker.lookahead import ConstantLookahead
from decode_worker.sequence import DecodeSequence
from decode_worker.speculative import SpeculativeDecoder
from tandem.config import SpeculationConfig
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import process_logits
from tandem.engine.work_state import sampling_state
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, SpeculationPolicy
from tandem.work import Work
from tests.checkpoints import tiny_llama
from tests.decode_worker.test_speculative import HANDLE, run
from tests.serving import tokenizer

NUM_DRAWS, BATCH, FALSE_ALARM = 20_000, 500, 1e-4
NUM_TOKENS = 3  # the first two are counted; the third lets drafts reach further
MIN_EXPECTED = 5.0  # cells with fewer expected draws are counted together
PROMPT, BLOCK_SIZE = (17, 80, 3, 211, 9, 80), 16
SAMPLING = {
    "top-k": {"temperature": 0.9, "top_k": 6},
    "top-p and min-p": {"temperature": 1.1, "top_p": 0.12, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.6, "presence_penalty": 0.7, "frequency_penalty": 0.9, "top_k": 5}
    | {"temperature": 0.7},
}
CASES = {
    "auto, 1 token": (SpeculationPolicy.AUTO, 1, 0.0),
    "auto, 3 tokens, tau": (SpeculationPolicy.AUTO, 3, 0.02),
    "exact, 3 tokens": (SpeculationPolicy.EXACT, 3, 0.0),
}


@pytest.fixture(scope="module")
def target() -> ModelRunner:
    return ModelRunner.load(tiny_llama(), num_blocks=BATCH, block_size=BLOCK_SIZE)


@pytest.fixture(scope="module")
def draft() -> ModelRunner:
    """The target in four bits: it agrees often, but not always."""
    return ModelRunner.load(tiny_llama(), num_blocks=BATCH, block_size=BLOCK_SIZE, quantization="fp4")


def sequence(
    target: ModelRunner, index: int, seed: int, sampling: dict[str, float], controls: SpeculationParams
) -> DecodeSequence:
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=seed, **sampling)
    work = Work(
        request_id=f"r{index}",
        epoch=1,
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        sampling=params,
        deadline_s=time.monotonic() + 1000,
        fingerprint=bytes(32),
        speculation=controls,
    )
    return DecodeSequence(
        work,
        HANDLE,
        emit=lambda news: None,
        output=work.output_stream(tokenizer(), ()),
        sampling=sampling_state(work, target),
        blocks=[index],
    )


def prefill(target: ModelRunner, count: int) -> None:
    rows = [SequenceRows(PROMPT[:-1], 0, [index]) for index in range(count)]
    target.forward(target.batch(rows))


def exact_pairs(target: ModelRunner, sampling: dict[str, float]) -> dict[tuple[int, int], float]:
    """Probability of each pair of tokens, from teacher-forced logits of the target."""
    state = sequence(target, 0, 0, sampling, SpeculationParams()).sampling

    def probs(*tokens: int) -> torch.Tensor:
        rows = SequenceRows((*PROMPT, *tokens), 0, [0])
        for token in tokens:
            state.append(token)
        found = process_logits(target.forward(target.batch([rows])), [state])[0].double().softmax(-1)
        state.rollback(len(tokens))
        return found

    first = probs()
    return {
        (a, b): float(first[a] * p)
        for a in first.nonzero().flatten().tolist()
        for b, p in enumerate(probs(a).tolist())
        if p > 0
    }


def p_value(counts: dict[tuple[int, int], int], expected: dict[tuple[int, int], float]) -> float:
    assert set(counts) <= set(expected), "a pair that cannot be drawn"
    cells, rest = [], [0.0, 0.0]
    for pair, probability in expected.items():
        cell = [float(counts.get(pair, 0)), probability * NUM_DRAWS]
        if cell[1] >= MIN_EXPECTED:
            cells.append(cell)
        else:
            rest = [rest[0] + cell[0], rest[1] + cell[1]]
    if rest[1] >= MIN_EXPECTED:
        cells.append(rest)
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    half_freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


# Each way of sampling and each case once; the other pairs are in `make test-long`.
SHORT = set(zip(SAMPLING, ("auto, 1 token", "exact, 3 tokens", "auto, 3 tokens, tau"), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, marks=[pytest.mark.long] * ((kind, case) not in SHORT))
        for kind in SAMPLING
        for case in CASES
    ],
)
def test_draws_have_the_targets_distribution(target, draft, kind, case) -> None:
    policy, num_tokens, tau = CASES[case]
    controls = SpeculationParams(policy=policy, assistant_confidence_threshold=tau)
    lookahead = ConstantLookahead(SpeculationConfig(num_assistant_tokens=num_tokens))
    decoder = SpeculativeDecoder(target, ModelDraft(draft), lookahead)
    expected = exact_pairs(target, SAMPLING[kind])
    assert 8 <= len(expected) <= 2000
    counts: dict[tuple[int, int], int] = {}
    for start in range(0, NUM_DRAWS, BATCH):
        prefill(target, BATCH)
        running = [sequence(target, i, start + i, SAMPLING[kind], controls) for i in range(BATCH)]
        for first, second, *_ in run(decoder, running):
            counts[first, second] = counts.get((first, second), 0) + 1
    assert sum(counts.values()) == NUM_DRAWS
    assert decoder.stats.num_accepted > 0
    assert decoder.stats.num_rollbacks > 0
    assert p_value(counts, expected) > FALSE_ALARM


def test_the_test_finds_a_wrong_distribution(target) -> None:
    """Draws from a colder target are caught."""
    expected = exact_pairs(target, SAMPLING["top-k"])
    colder = exact_pairs(target, SAMPLING["top-k"] | {"temperature": 0.7})
    counts = {pair: round(probability * NUM_DRAWS) for pair, probability in colder.items()}
    assert p_value(counts, expected) < FALSE_ALARM
    fair = {pair: round(probability * NUM_DRAWS) for pair, probability in expected.items()}
    assert p_value(fair, expected) > 0.5
