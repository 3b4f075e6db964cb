"""What own kernels judge within a forward is what Python judges from its logits."""

from __future__ import annotations

import numpy as np
import pytest

from decode_worker.decoder import Advance, draws_of
from decode_worker.drafts.draft import Proposal
from decode_worker.sequence import DecodeSequence
from decode_worker.speculative import SpeculativeDecoder
from decode_worker.verification import drafted_rows, verify, verify_chosen
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.engine.rng import Stream, exponentials
from tandem.speculation import SpeculationParams, SpeculationPolicy
from tests.checkpoints import tiny_llama
from tests.decode_worker.test_distribution import PROMPT, sequence

SAMPLING: tuple[dict[str, float], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 6},
    {"temperature": 1.2, "top_p": 0.3, "min_p": 0.01},
    {"temperature": 0.0},
)
POLICIES = [SpeculationPolicy.AUTO, SpeculationPolicy.AUTO, SpeculationPolicy.EXACT]
NUM_SEQUENCES = 12


@pytest.fixture(scope="module")
def target() -> ModelRunner:
    runner = ModelRunner.load(tiny_llama(), num_blocks=NUM_SEQUENCES, block_size=16)
    assert runner.can_guess
    runner.forward(runner.batch([SequenceRows(PROMPT, 0, [i]) for i in range(NUM_SEQUENCES)]))
    return runner


def proposal(target: ModelRunner, of: DecodeSequence, rng: np.random.Generator) -> Proposal:
    """Some tokens that the target likes, drawn from what it likes, mixed with chance; or sure ones."""
    num_tokens, vocab = int(rng.integers(4)), target.vocab_size
    probs = [rng.dirichlet(np.full(vocab, 0.02)).astype(np.float32) for _ in range(num_tokens)]
    if rng.random() < 0.3:  # as from prompt lookup
        return Proposal([int(each.argmax()) for each in probs])
    key = [int(rng.integers(1 << 40))], [of.sampling.position]
    waits = exponentials(*key, Stream.DRAFT, vocab)[0]
    return Proposal([int((each / waits).argmax()) for each in probs], probs)


def liked(target: ModelRunner, token_ids: list[int]) -> list[int]:
    """As many tokens as there are, each the most probable one: some of them are accepted."""
    rows = [SequenceRows(PROMPT[-1:], len(PROMPT) - 1, [0])]
    for token in target.guess(rows, [max(len(token_ids), 1)], [0.0])[0].token_ids[: len(token_ids)]:
        token_ids = [*token_ids[1:], token]
    return token_ids


def judged(target: ModelRunner, seed: int) -> list[Advance]:
    """A batch of all kinds of sequences, judged twice."""
    rng = np.random.default_rng(seed)
    controls = [SpeculationParams(policy=POLICIES[i % 3]) for i in range(NUM_SEQUENCES)]
    seeds = rng.integers(1 << 60, size=NUM_SEQUENCES).tolist()

    def sequences() -> list[DecodeSequence]:
        return [sequence(target, i, seeds[i], SAMPLING[i % 4], controls[i]) for i in range(NUM_SEQUENCES)]

    by_python, by_kernels = sequences(), sequences()
    proposals = [proposal(target, each, rng) for each in by_python]
    for each in proposals[::5]:
        each.token_ids = liked(target, each.token_ids)
    rows = [SpeculativeDecoder._rows(*pair) for pair in zip(by_python, proposals, strict=True)]
    expected = verify(by_python, proposals, target.forward(target.batch(rows)))
    draws = draws_of(by_kernels, [len(each.token_ids) for each in rows])
    token_ids = target.choose(rows, draws, drafted_rows(by_kernels, proposals))
    assert verify_chosen(by_kernels, proposals, token_ids) == expected
    assert [s.sampling.output_ids for s in by_kernels] == [s.sampling.output_ids for s in by_python]
    return expected


def test_own_kernels_judge_as_python_does(target: ModelRunner) -> None:
    advances = [advance for seed in range(60) for advance in judged(target, seed)]
    drafted, accepted = (sum(getattr(a, name) for a in advances) for name in ("num_drafted", "num_accepted"))
    assert drafted > 500
    assert 0.02 < accepted / drafted < 0.98, "either rule alone would pass"
