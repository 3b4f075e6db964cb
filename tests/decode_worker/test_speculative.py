"""Whatever a draft does, tokens are those of plain decoding; only the number of steps changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from decode_worker.decoder import Decoder, PlainDecoder
from decode_worker.drafting import make_decoder
from decode_worker.drafts.draft import Proposal
from decode_worker.drafts.model import ModelDraft
from decode_worker.drafts.ngram import NgramDraft
from decode_worker.drafts.shared import SharedDraft
from decode_worker.lookahead import PATIENCE, ConstantLookahead
from decode_worker.sequence import DecodeSequence
from decode_worker.speculative import MAX_FAILURES, SpeculativeDecoder
from kvstore.key import KvHandle
from tandem.config import ClusterConfig, ModelConfig, SpeculationConfig
from tandem.draft_checkpoint import usable_draft
from tandem.engine.batch import SequenceRows
from tandem.engine.loading import load_engine
from tandem.engine.model_runner import ModelRunner
from tandem.engine.work_state import sampling_state
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, SpeculationPolicy
from tandem.tokenizer import Tokenizer
from tandem.work import Work
from tests.checkpoints import VOCAB_SIZE, save_llama, tiny_llama

NUM_TOKENS = 16
NUM_BLOCKS, BLOCK_SIZE = 64, 16
HANDLE = KvHandle(
    object_id=bytes(16), epoch=0, store_epoch=0, num_bytes=1, num_tokens=1, fingerprint=bytes(32)
)
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, top_k=50, top_p=0.95, min_p=0.01)
PENALIZED = replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1, min_tokens=5)
EVERYTHING = replace(SAMPLED, repetition_penalty=1.2, logit_bias={65: 3.0, 66: -100.0}, logprobs=2)


@pytest.fixture(scope="module")
def target() -> ModelRunner:
    return ModelRunner.load(tiny_llama(), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A model of the same vocabulary that knows nothing of the target: most guesses are wrong."""
    path = save_llama(tmp_path_factory.mktemp("draft") / "other", seed=5)
    return ModelRunner.load(path, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


@pytest.fixture(scope="module")
def twin() -> ModelRunner:
    """The target itself as a draft: every guess is right."""
    return ModelRunner.load(tiny_llama(), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


def sequences(target: ModelRunner, params: SamplingParams, policy: SpeculationPolicy) -> list[DecodeSequence]:
    """Five prompts of mixed length, prefilled into the target's cache, each in blocks of its own."""
    tokenizer = Tokenizer.from_dir(tiny_llama())
    rng = np.random.default_rng(3)
    found = []
    for index, length in enumerate((1, 7, 16, 33, 60)):
        work = Work(
            request_id=f"r{index}",
            epoch=1,
            token_ids=tuple(rng.integers(0, 256, length + 1).tolist()),
            num_prompt_tokens=length,
            sampling=replace(params, seed=index),
            deadline_s=time.monotonic() + 100,
            fingerprint=bytes(32),
            speculation=SpeculationParams(policy=policy),
        )
        sequence = DecodeSequence(
            work,
            HANDLE,
            emit=lambda news: None,
            output=work.output_stream(tokenizer, ()),
            sampling=sampling_state(work, target),
            blocks=list(range(index * 8, index * 8 + 8)),
        )
        target.forward(target.batch([SequenceRows(work.token_ids[:-1], 0, sequence.blocks, num_logits=1)]))
        found.append(sequence)
    return found


def run(decoder: Decoder, running: list[DecodeSequence]) -> list[list[int]]:
    """Decode everybody to the end, as the worker does; sequences leave as they finish."""
    everybody = list(running)
    while running:
        for sequence, advance in zip(running, decoder.step(running), strict=True):
            assert advance.tokens
            for token in advance.tokens:
                sequence.advance(token.token_id)
                if sequence.output.append(token.token_id).finish:
                    sequence.is_finished = True
                    break
        decoder.settle(running)
        for sequence in running:
            if sequence.is_finished:
                decoder.leave(sequence)
        running = [sequence for sequence in running if not sequence.is_finished]
    return [sequence.token_ids[sequence.work.num_prompt_tokens :] for sequence in everybody]


def plain(target: ModelRunner, params: SamplingParams) -> list[list[int]]:
    return run(PlainDecoder(target), sequences(target, params, SpeculationPolicy.OFF))


def speculative(target: ModelRunner, draft: object, num_tokens: int = 3) -> SpeculativeDecoder:
    lookahead = ConstantLookahead(SpeculationConfig(num_assistant_tokens=num_tokens, max_assistant_tokens=8))
    return SpeculativeDecoder(target, draft, lookahead)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "params", [GREEDY, SAMPLED, PENALIZED, EVERYTHING], ids=["greedy", "sampled", "pen", "all"]
)
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_a_wrong_draft_changes_nothing(target, other, params, num_tokens) -> None:
    decoder = speculative(target, ModelDraft(other), num_tokens)
    assert run(decoder, sequences(target, params, SpeculationPolicy.EXACT)) == plain(target, params)
    assert decoder.stats.num_drafted > 0
    assert decoder.stats.num_rollbacks > 0


@pytest.mark.parametrize(
    "params", [GREEDY, SAMPLED, PENALIZED, EVERYTHING], ids=["greedy", "sampled", "pen", "all"]
)
def test_a_perfect_draft_is_accepted_whole_and_saves_steps(target, twin, params) -> None:
    decoder = speculative(target, ModelDraft(twin), 4)
    assert run(decoder, sequences(target, params, SpeculationPolicy.EXACT)) == plain(target, params)
    assert decoder.stats.num_accepted == decoder.stats.num_drafted > 0
    assert decoder.stats.num_steps < 5 * NUM_TOKENS / 3


@pytest.mark.parametrize(
    "params", [GREEDY, SAMPLED, PENALIZED, EVERYTHING], ids=["greedy", "sampled", "pen", "all"]
)
@pytest.mark.parametrize("seed", [None, 5], ids=["own-weights", "other-weights"])
def test_a_draft_on_the_targets_own_cache_changes_nothing(target, tmp_path, params, seed) -> None:
    """It overwrites KV of places that are not computed yet only; the same weights always agree."""
    path = tiny_llama() if seed is None else save_llama(tmp_path / "other", seed=seed)
    draft = ModelRunner.load(path, num_blocks=1, block_size=BLOCK_SIZE).over(target.cache)
    decoder = speculative(target, SharedDraft(draft), 4)
    assert run(decoder, sequences(target, params, SpeculationPolicy.EXACT)) == plain(target, params)
    assert decoder.stats.num_drafted > 0
    assert (decoder.stats.num_rollbacks == 0) == (seed is None)


@pytest.mark.parametrize("policy", [SpeculationPolicy.EXACT, SpeculationPolicy.AUTO])
@pytest.mark.parametrize("num_assistant_tokens", [0, 1, 3, 7])
@pytest.mark.parametrize(
    ("draft", "quantization"),
    [
        ("self", ("none", "nf4")),
        ("self", ("int8", "int4")),
        ("qspec", ("nf4", "none")),
        ("qspec", ("int4", "none")),
        ("model", ("fp4-dq", "int8")),
        ("model", ("none", "auto")),
        ("self", ("none", "auto")),
    ],
)
def test_quantized_drafts_change_no_token(
    tmp_path, draft, quantization, num_assistant_tokens, policy
) -> None:
    """As a worker is configured: whatever the target's precision, its own plain tokens come out."""
    path = save_llama(tmp_path / "draft", seed=5) if draft == "model" else None
    config = ClusterConfig(
        model=ModelConfig(path=tiny_llama(), quantization=quantization[0]),
        speculation=SpeculationConfig(
            draft=draft,
            draft_path=path,
            draft_quantization=quantization[1],
            num_assistant_tokens=num_assistant_tokens,
        ),
    )
    engine = load_engine(config, "decode", 1 << 22, 1, usable_draft(config))
    assert engine.draft is not None
    assert (engine.draft.cache is engine.model.cache) == (draft != "model")
    params = GREEDY if policy is SpeculationPolicy.AUTO else EVERYTHING
    expected = run(PlainDecoder(engine.model), sequences(engine.model, params, SpeculationPolicy.OFF))
    decoder = make_decoder(config.speculation, engine)
    assert isinstance(decoder, SpeculativeDecoder)
    assert run(decoder, sequences(engine.model, params, policy)) == expected
    if num_assistant_tokens:
        assert decoder.stats.num_drafted > 0


def test_kv_of_a_shared_draft_that_failed_is_never_read(target) -> None:
    """The draft writes NaN wherever it may, raises, and leaves: the steps to come overwrite it."""

    class Poisonous(SharedDraft):
        def propose(
            self, running: Sequence[DecodeSequence], counts: Sequence[int], worth: float = 0.0
        ) -> list[Proposal]:
            for sequence, count in zip(running, counts, strict=True):
                rows = SequenceRows([65] * count, sequence.num_computed, sequence.blocks)
                self._model.forward(self._model.batch([rows]))
                poison(target, sequence, count)
            raise RuntimeError("half-way")

    def poison(model: ModelRunner, sequence: DecodeSequence, count: int) -> None:
        data = model.cache._data
        for position in range(sequence.num_computed, sequence.num_computed + count):
            data[:, :, :, sequence.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE] = float("nan")

    decoder = speculative(target, Poisonous(target), 4)
    assert run(decoder, sequences(target, GREEDY, SpeculationPolicy.EXACT)) == plain(target, GREEDY)
    assert decoder.earnings.num_failures == MAX_FAILURES


def test_what_speculation_did_is_counted_place_by_place(target, other, twin) -> None:
    for draft, is_right in ((twin, True), (other, False)):
        running = sequences(target, GREEDY, SpeculationPolicy.EXACT)
        decoder = speculative(target, ModelDraft(draft), 4)
        run(decoder, list(running))
        stats = decoder.stats
        assert sum(stats.drafted_at) == stats.num_drafted
        assert sum(stats.accepted_at) == stats.num_accepted
        assert (stats.accepted_at[:4] == stats.drafted_at[:4]) is is_right
        assert stats.num_rolled_back == stats.num_drafted - stats.num_accepted
        assert sum(s.speculated.num_drafted for s in running) == stats.num_drafted
        assert sum(s.speculated.num_steps for s in running) == stats.num_steps
        assert all(s.speculated.verify_s > 0 and s.speculated.draft_s > 0 for s in running)


def test_tau_stops_are_counted_and_per_request(target, other) -> None:
    sure = SpeculationParams(assistant_confidence_threshold=0.0)
    unsure = SpeculationParams(assistant_confidence_threshold=1.0)
    running = sequences(target, GREEDY, SpeculationPolicy.EXACT)
    for index, sequence in enumerate(running):
        sequence.work = replace(sequence.work, speculation=unsure if index % 2 else sure)
    decoder = speculative(target, ModelDraft(other, threshold=0.5))
    assert run(decoder, list(running)) == plain(target, GREEDY)
    for index, sequence in enumerate(running):
        assert (sequence.speculated.num_drafted == 0) == bool(index % 2)
        assert (sequence.speculated.num_tau_stops > 0) == bool(index % 2)


def test_prompt_lookup_changes_nothing_and_sometimes_hits(target) -> None:
    decoder = speculative(target, NgramDraft())
    assert run(decoder, sequences(target, GREEDY, SpeculationPolicy.EXACT)) == plain(target, GREEDY)
    assert decoder.stats.num_accepted > 0


def test_auto_policy_leaves_greedy_requests_alone(target, other) -> None:
    decoder = speculative(target, ModelDraft(other))
    assert run(decoder, sequences(target, GREEDY, SpeculationPolicy.AUTO)) == plain(target, GREEDY)


def test_auto_policy_accepts_a_perfect_draft_always(target, twin) -> None:
    """Target and draft distributions are equal, so min(1, target / draft) is 1."""
    decoder = speculative(target, ModelDraft(twin))
    run(decoder, sequences(target, SAMPLED, SpeculationPolicy.AUTO))
    assert decoder.stats.num_accepted == decoder.stats.num_drafted > 0


def test_off_policy_drafts_nothing(target, other) -> None:
    decoder = speculative(target, ModelDraft(other))
    assert run(decoder, sequences(target, SAMPLED, SpeculationPolicy.OFF)) == plain(target, SAMPLED)
    assert decoder.stats.num_drafted == 0


def test_a_threshold_of_one_drafts_nothing_below_certainty(target, other) -> None:
    decoder = speculative(target, ModelDraft(other, threshold=1.0))
    assert run(decoder, sequences(target, SAMPLED, SpeculationPolicy.EXACT)) == plain(target, SAMPLED)
    assert decoder.stats.num_drafted == 0


def test_what_a_draft_has_to_read_of_a_sequence(target, other) -> None:
    """All of a new one but what the prefill worker read for it; next to nothing once it drafts along."""
    draft = ModelDraft(other)
    decoder = speculative(target, draft)
    running = sequences(target, GREEDY, SpeculationPolicy.EXACT)
    running[3].num_draft_computed = 30
    assert [draft.num_unread(s) for s in running] == [0, 0, 17, 0, 61]
    running[3].num_draft_computed = 0
    assert draft.num_unread(running[3]) == 34
    for _ in range(2):
        for sequence, advance in zip(running, decoder.step(running), strict=True):
            for token in advance.tokens:
                sequence.advance(token.token_id)
        decoder.settle(running)
    assert [draft.num_unread(s) for s in running] == [0] * 5


def test_a_step_without_draft_tokens_is_a_plain_one(target, other) -> None:
    """The draft is not asked, and what the step took is counted all the same."""
    draft = StubbornDraft(lambda count: Proposal([65] * count))
    decoder = speculative(target, draft, num_tokens=0)
    assert run(decoder, sequences(target, EVERYTHING, SpeculationPolicy.EXACT)) == plain(target, EVERYTHING)
    assert draft.num_calls == 0
    assert decoder.stats.num_steps > 0
    assert decoder.stats.verify_s > 0


def test_plain_steps_are_learnt_from_together_and_counted_one_by_one(target, other) -> None:
    decoder = speculative(target, ModelDraft(other))
    running, asked = sequences(target, GREEDY, SpeculationPolicy.OFF), []
    counts = decoder._lookahead.counts
    decoder._lookahead.counts = lambda some: asked.append(len(some)) or counts(some)
    before = running[0].output.num_tokens
    run(decoder, list(running))
    num_steps = running[0].output.num_tokens - before
    assert len(asked) == -(-num_steps // PATIENCE) < num_steps  # they all end together
    assert [s.speculated.num_steps for s in running] == [num_steps] * len(running)
    assert decoder.stats.num_steps == num_steps * len(running)
    told = sum(s.speculated.verify_s / len(running) for s in running)
    assert decoder.stats.verify_s == pytest.approx(told)


def test_a_request_that_ends_knows_its_plain_steps_at_once_and_once(target, other) -> None:
    decoder = speculative(target, ModelDraft(other))
    running = sequences(target, GREEDY, SpeculationPolicy.OFF)
    for _ in range(3):
        for sequence, advance in zip(running, decoder.step(running), strict=True):
            sequence.advance(advance.tokens[0].token_id)
        decoder.settle(running)
    ended = running.pop()
    assert ended.usage().num_steps == 3
    assert ended.usage().verify_s == decoder._run._tally.verify_s > 0
    decoder.leave(ended)
    assert [s.usage().num_steps for s in (ended, *running)] == [3] * (1 + len(running))
    assert decoder.stats.num_steps == 3 * (1 + len(running))


class StubbornDraft:
    """Proposes what it is told to, whatever the sequences are."""

    def __init__(self, propose: Callable[[int], Proposal]) -> None:
        self._propose = propose
        self.num_calls = 0
        self.catch_up_s = 0.0

    def propose(
        self, running: Sequence[DecodeSequence], counts: Sequence[int], worth: float = 0.0
    ) -> list[Proposal]:
        self.num_calls += 1
        return [self._propose(count) for count in counts]

    def num_unread(self, sequence: DecodeSequence) -> int:
        return 0

    def settle(self, sequence: DecodeSequence) -> None: ...

    def leave(self, sequence: DecodeSequence) -> None: ...


@pytest.mark.parametrize("policy", [SpeculationPolicy.EXACT, SpeculationPolicy.AUTO])
@pytest.mark.parametrize(
    "propose",
    [
        lambda count: Proposal([VOCAB_SIZE] * count),
        lambda count: Proposal([-1] * count),
        lambda count: Proposal([65] * (count + 50)),
        lambda count: Proposal([65] * count, [np.full(VOCAB_SIZE, np.nan)] * count),
        lambda count: Proposal([65] * count, [np.zeros(VOCAB_SIZE)] * count),
    ],
    ids=["beyond-vocab", "negative", "too-many", "nan", "zero"],
)
def test_a_draft_that_talks_nonsense_changes_no_greedy_token(target, policy, propose) -> None:
    decoder = speculative(target, StubbornDraft(propose))
    assert run(decoder, sequences(target, GREEDY, policy)) == plain(target, GREEDY)


def test_a_draft_that_raises_costs_its_guesses_and_is_switched_off(target, caplog) -> None:
    def fail(count: int) -> Proposal:
        raise RuntimeError("no memory for drafts")

    draft = StubbornDraft(fail)
    decoder = speculative(target, draft)
    assert run(decoder, sequences(target, SAMPLED, SpeculationPolicy.EXACT)) == plain(target, SAMPLED)
    assert draft.num_calls == decoder.earnings.num_failures == MAX_FAILURES


def test_a_draft_that_fails_half_way_leaves_no_trace_in_the_history(target, other) -> None:
    """The sampling history must not keep the guesses of a draft that raised after making some."""

    class Interrupted(ModelDraft):
        def settle(self, sequence: DecodeSequence) -> None:
            super().settle(sequence)

        def propose(
            self, running: Sequence[DecodeSequence], counts: Sequence[int], worth: float = 0.0
        ) -> list[Proposal]:
            for sequence in running:
                sequence.sampling.append(65)
            raise RuntimeError("interrupted")

    decoder = speculative(target, Interrupted(other))
    assert run(decoder, sequences(target, EVERYTHING, SpeculationPolicy.EXACT)) == plain(target, EVERYTHING)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_goes_on_while_all_of_it_may_stand(params: SamplingParams) -> None:
    """Greedy requests do, whatever runs the forward; sampled ones have the number they are given."""
    found = []
    for implementation in ("native", "lean"):
        size = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE}
        runner = ModelRunner.load(tiny_llama(), implementation=implementation, **size)
        running = sequences(runner, params, SpeculationPolicy.EXACT)
        draft = SharedDraft(runner)
        proposals = [draft.propose(running, [6] * 5, worth) for worth in (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)]
        found.append([[len(proposal.token_ids) for proposal in each] for each in proposals])
    native, lean = found
    assert native == lean
    assert native[0] == [6] * 5
    assert native[-1] == ([1] if params is GREEDY else [6]) * 5
    for lens in zip(*native, strict=True):  # of one sequence: the more a token must be worth, the fewer
        assert list(lens) == sorted(lens, reverse=True)
