"""The number of draft tokens is the one that pays, given costs and acceptance; limits always hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.auto_lookahead import CALIBRATE_AT, CALIBRATE_EVERY, PAUSE, AutoLookahead
from decode_worker.decoder import Advance
from decode_worker.lookahead import ConstantLookahead, HeuristicLookahead, StepOutcome
from decode_worker.probe import FIRST_AFTER, MOST_TRIES, READ_SHARE, Probe
from decode_worker.step_costs import Division, DraftCosts, StepCosts
from tandem.config import SpeculationConfig
from tandem.engine.costs import ForwardCosts, LiveCosts
from tandem.engine.sampler import SampledToken
from tandem.speculation import SpeculationParams, SpeculationPolicy

FLAT = ForwardCosts((1, 64), (1.0, 1.0))  # a forward costs the same whatever it holds
LINEAR = ForwardCosts((1, 64), (1.0, 64.0))  # each row costs as much as the first
CHEAP = ForwardCosts((1, 64), (0.05, 0.05))


@dataclass(frozen=True, eq=False)
class Sequence:
    """What a look-ahead reads of a sequence."""

    left: int = 100
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    goes_by_confidence: bool = True

    @property
    def work(self) -> object:
        return SimpleNamespace(speculation=self.speculation)

    @property
    def num_tokens_left(self) -> int:
        return self.left


def costs_of(target: ForwardCosts, draft: ForwardCosts | None, start_s: float = 0.0) -> StepCosts:
    return StepCosts(target, DraftCosts(start_s, draft) if draft else None)


def auto(most: int, target: ForwardCosts, draft: ForwardCosts | None) -> AutoLookahead:
    return AutoLookahead(most, costs_of(target, draft))


def tell(lookahead: object, *outcomes: tuple[Sequence, int, int]) -> None:
    """One step: (sequence, drafted, accepted) each."""
    advances = [Advance(num_drafted=drafted, num_accepted=accepted) for _, drafted, accepted in outcomes]
    lookahead.observe(StepOutcome([s for s, _, _ in outcomes], advances, 0.1, 1.0))  # type: ignore[attr-defined]


def is_due(probe: Probe, read_s: float) -> bool:
    """After one more plain step of a second."""
    probe.pass_by(1)
    return probe.is_near and probe.is_due(read_s, 1.0)


def test_a_cheap_draft_beside_a_flat_target_drafts_far() -> None:
    assert auto(8, FLAT, CHEAP).counts([Sequence()])[0] >= 3


def test_a_draft_that_knows_how_sure_it_is_goes_as_far_as_that_pays() -> None:
    """Others have the number that pays on average."""
    costs = costs_of(ForwardCosts((1, 2, 64), (1.0, 1.2, 13.6)), ForwardCosts((1, 64), (0.1, 0.1)))
    sampled, greedy = Sequence(goes_by_confidence=False), Sequence()
    lookahead = AutoLookahead(8, costs, has_confidence=True)
    [planned] = lookahead.counts([sampled])
    assert 1 <= planned < 8
    assert lookahead.counts([greedy]) == [8]
    assert 0.1 < lookahead.worth < 0.9
    assert lookahead.counts([Sequence(left=4)]) == [3]
    without = AutoLookahead(8, costs)
    assert (without.counts([greedy]), without.worth) == ([planned], 0.0)


def test_a_draft_known_to_agree_starts_where_another_would_have_to_show_it() -> None:
    """Six tenths as dear as the target."""
    costs = costs_of(ForwardCosts((1, 64), (1.0, 4.0)), ForwardCosts((1, 64), (0.6, 0.6)))
    assert AutoLookahead(8, costs).counts([Sequence()]) == [0]
    sure = AutoLookahead(8, costs, prior=0.9)
    assert sure.counts([Sequence()])[0] >= 1
    for _ in range(40):
        tell(sure, (Sequence(), 1, 0))
    assert sure.counts([Sequence()]) == [0]
    for _ in range(2000):
        tell(sure, (Sequence(), 0, 0))
    assert 0.85 < sure.acceptance <= 0.9


def test_one_more_token_is_worth_its_forward_and_its_row() -> None:
    """By hand: two sequences, rows of 0.2 s each, a forward of the draft 0.3 s, tokens of 0.5 s each."""
    costs = costs_of(ForwardCosts((1, 64), (1.0, 13.6)), ForwardCosts((1, 64), (0.3, 0.3)))
    division = Division([2, 1], gain=costs.plain_s(2) / (2 * 0.5))
    assert costs.worth(division, 0.8) == pytest.approx((0.15 + 0.2) / (0.5 * 0.8))
    assert costs.worth(division, 0.1) == 1.0


def test_no_confidence_is_asked_for_where_nothing_is_drafted() -> None:
    lookahead = AutoLookahead(8, costs_of(LINEAR, CHEAP), has_confidence=True)
    assert (lookahead.counts([Sequence()] * 4), lookahead.worth) == ([0] * 4, 0.0)


@pytest.mark.parametrize(
    ("target", "draft"), [(FLAT, FLAT), (LINEAR, CHEAP)], ids=["dear draft", "dear rows"]
)
def test_where_drafting_cannot_pay_nothing_is_drafted(target: ForwardCosts, draft: ForwardCosts) -> None:
    costs = costs_of(target, draft)
    assert AutoLookahead(8, costs).counts([Sequence() for _ in range(4)]) == [0] * 4
    assert costs.best_gain(0.6, 4, 8) == 1
    assert costs.needed_acceptance(4, 8) > 0.6


def test_a_larger_batch_drafts_less() -> None:
    """Rows are free up to 8 and linear from there."""
    target = ForwardCosts((1, 8, 64), (1.0, 1.0, 8.0))
    depths = [
        sum(auto(8, target, CHEAP).counts([Sequence() for _ in range(batch)])) / batch
        for batch in (1, 2, 4, 32)
    ]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > 0 == depths[-1]


def test_acceptance_is_learnt_both_ways() -> None:
    lookahead, sequence = auto(8, FLAT, CHEAP), Sequence()
    before = lookahead.counts([sequence])[0]
    for _ in range(200):
        tell(lookahead, (sequence, 3, 0))
    assert lookahead.acceptance < 0.05
    lookahead.leave(sequence)
    assert AutoLookahead.counts(lookahead, [Sequence()])[0] < before
    for _ in range(200):
        tell(lookahead, (sequence, 3, 3))
    assert lookahead.acceptance > 0.95
    assert lookahead.counts([sequence, Sequence()])[0] == 8


def test_rows_go_to_sequences_that_agree_with_their_draft() -> None:
    """The batch's rows are shared out by what stands, not evenly."""
    target = ForwardCosts((1, 12, 64), (1.0, 1.0, 8.0))
    lookahead, good, bad = auto(8, target, CHEAP), Sequence(), Sequence()
    for _ in range(40):
        tell(lookahead, (good, 4, 4), (bad, 4, 0))
    counts = lookahead.counts([bad, good])
    assert counts[1] >= counts[0] + 4
    lookahead.counts([good])
    assert lookahead.counts([good, bad]) == counts[::-1]  # whatever their order


def test_costs_that_turn_out_higher_are_corrected() -> None:
    """The draft takes far longer than measured at start: drafting stops."""
    costs = costs_of(FLAT, CHEAP)
    lookahead = AutoLookahead(8, costs)
    assert lookahead.counts([Sequence()])[0] > 0
    for _ in range(50):
        drafted = Advance(num_drafted=3, num_accepted=3)
        costs.observe(StepOutcome([Sequence()], [drafted], draft_s=6.0, verify_s=1.0))
    assert lookahead.counts([Sequence()]) == [0]


def test_a_guess_costs_a_start_and_its_forwards() -> None:
    """Told apart by guesses of one and of five tokens; what a guess takes later moves both."""
    single, deep = ForwardCosts((1, 4), (5.0, 6.0)), ForwardCosts((1, 4), (1.8, 2.0))
    costs = DraftCosts.of(single, deep, 5)
    assert (costs.start_s, costs.forward.seconds) == (4.0, (1.0, 1.0))
    noisy = DraftCosts.of(single, ForwardCosts((1, 4), (7.0, 0.5)), 5)  # cannot be: a forward costs something
    assert (noisy.start_s, noisy.forward.seconds) == (0.0, (5.0, 5.0))


def test_a_dear_start_makes_guesses_deep_or_none() -> None:
    target = ForwardCosts((1, 64), (1.0, 1.0))
    cheap, dear, hopeless = (
        AutoLookahead(8, costs_of(target, CHEAP, start_s)).counts([Sequence()])[0]
        for start_s in (0.0, 0.5, 5.0)
    )
    assert 0 < cheap <= dear
    assert hopeless == 0


def test_an_unsure_draft_is_a_rejection_and_took_its_time() -> None:
    """A token the draft did not give counts against it; the step is no plain one."""
    lookahead, sequence = auto(8, FLAT, CHEAP), Sequence()
    before = lookahead.acceptance
    outcome = StepOutcome([sequence], [Advance(is_tau_stop=True)], 0.1, 1.0)
    assert (outcome.depth, outcome.num_drafting, outcome.num_rows) == (1, 1, 1)
    lookahead.observe(outcome)
    assert lookahead.acceptance < before


def test_tokens_given_because_the_draft_was_sure_say_nothing_of_the_next() -> None:
    """Who goes by confidence is judged by first tokens; others by all."""
    lookahead = AutoLookahead(8, costs_of(FLAT, CHEAP), has_confidence=True)
    before = lookahead.acceptance
    for _ in range(100):
        tell(lookahead, (Sequence(), 6, 6), (Sequence(), 1, 0))  # sure and right, or unsure and wrong
    assert abs(lookahead.acceptance - 0.5) < 0.1 < before - 0.5
    for _ in range(100):
        tell(lookahead, *((Sequence(goes_by_confidence=False), *told) for told in ((6, 6), (1, 0))))
    assert lookahead.acceptance > 0.8


def test_plain_decoding_is_probed_ever_less_often_by_one_sequence() -> None:
    lookahead, running = auto(8, FLAT, FLAT), [Sequence(), Sequence()]
    steps = []
    for step in range(8 * FIRST_AFTER):
        counts = lookahead.counts(running)
        if any(counts):
            steps.append(step)
            assert counts == [0, 1]
        tell(lookahead, (running[0], 0, 0), (running[1], counts[1], 0))
    assert len(steps) == 3
    assert steps[1] - steps[0] > steps[0]


def test_a_prompt_is_read_where_drafting_wins_its_time_back() -> None:
    """For a short answer it is not worth it, for a long one it is; one of a batch may be left out."""
    short, long, known = Sequence(left=20), Sequence(left=1000), Sequence(left=20)
    unread = {short: 640, long: 640}
    costs = costs_of(FLAT, CHEAP)  # reads a prompt of 640 tokens in half a step of the target
    slow = costs_of(FLAT, ForwardCosts((1, 64), (0.05, 2.0)))  # in 20 steps
    assert AutoLookahead(8, costs, lambda s: unread.get(s, 0)).counts([short])[0] > 0
    lookahead = AutoLookahead(8, slow, lambda s: unread.get(s, 0))
    assert lookahead.counts([short]) == [0]
    assert lookahead.counts([long])[0] > 0
    counts = lookahead.counts([short, long, known])
    assert counts[0] == 0 < min(counts[1:])


def test_a_probe_goes_to_a_sequence_that_the_draft_has_read() -> None:
    unread = {(new := Sequence()): 64}
    lookahead, probed = AutoLookahead(8, costs_of(FLAT, FLAT), lambda s: unread.get(s, 0)), []
    for _ in range(2 * FIRST_AFTER):
        probed.append(lookahead.counts([Sequence(), new]))
        tell(lookahead, (Sequence(), 0, 0), (new, 0, 0))
    assert [1, 0] in probed
    assert [0, 1] not in probed


def test_a_probe_waits_until_reading_is_a_small_part_of_the_time() -> None:
    probe, read_s = Probe(), 100.0
    waited = next(step for step in range(1, 10**6) if is_due(probe, read_s))
    assert waited == read_s / READ_SHARE
    tries = [is_due(probe, 0.0) for _ in range(3 * MOST_TRIES)]  # whatever the draft does
    assert tries == [True] * (MOST_TRIES - 1) + [False] * (2 * MOST_TRIES + 1)


@given(
    alphas=st.lists(st.floats(0, 0.98), min_size=1, max_size=6),
    slope=st.floats(0, 1),
    draft=st.floats(0, 1),
    start_s=st.floats(0, 1),
)
def test_no_constant_number_is_expected_to_bring_more(
    alphas: list[float], slope: float, draft: float, start_s: float
) -> None:
    """The best division of the rows is at least as good as the same number for everybody."""
    target = ForwardCosts((1, 64), (1.0, 1 + 63 * slope))
    costs = costs_of(target, ForwardCosts((1, 64), (draft, draft)), start_s)
    best, count = max(1.0, costs.best(alphas, 8).gain), len(alphas)
    plain = count / LiveCosts(target).at(count)
    for depth in range(9):
        tokens = sum(sum(alpha**d for d in range(depth + 1)) for alpha in alphas)
        seconds = LiveCosts(target).at(count * (1 + depth)) + depth * draft + (start_s if depth else 0)
        assert tokens / seconds / plain <= best * (1 + 1e-9)


def test_a_draft_that_is_always_wrong_never_pays_whatever_costs_seem_to_be() -> None:
    """Plain steps are seen more often than others: one of four rows may seem dearer than one of five."""
    costs = costs_of(ForwardCosts((4, 5, 64), (2.0, 1.0, 1.0)), None)
    assert costs.best([0.0] * 4, 8).gain == 1.0


def test_steps_in_which_the_draft_only_reads_are_no_plain_ones_to_race_against() -> None:
    lookahead, running = auto(8, FLAT, CHEAP), [Sequence(left=10**6)]
    drafted = Advance([SampledToken(1)] * 2, num_drafted=1, num_accepted=1)
    for _ in range(20):
        lookahead.observe(StepOutcome(running, [drafted], 0.5, 1.0))
    for _ in range(3):  # read for nine seconds
        lookahead.observe(StepOutcome(running, [Advance([SampledToken(1)])], 9.0, 1.0))
    assert lookahead._race.gain is None
    for _ in range(2):
        lookahead.observe(StepOutcome(running, [Advance([SampledToken(1)])], 0.0, 1.0))
    assert lookahead._race.gain == pytest.approx(2 / 1.5)


def test_the_heuristic_is_that_of_transformers() -> None:
    lookahead = HeuristicLookahead(SpeculationConfig(num_assistant_tokens=5, max_assistant_tokens=8))
    sequence = Sequence()
    seen = []
    for drafted, accepted in ((5, 5), (7, 7), (8, 2), (7, 0), (6, 6)):
        seen.append(lookahead.counts([sequence])[0])
        tell(lookahead, (sequence, drafted, accepted))
    assert seen == [5, 7, 8, 7, 6]
    for _ in range(20):
        tell(lookahead, (sequence, 3, 0))
    assert lookahead.counts([sequence]) == [1]
    lookahead.leave(sequence)
    assert lookahead.counts([sequence]) == [5]


@given(
    left=st.integers(1, 20),
    asked=st.one_of(st.none(), st.integers(1, 15)),
    most=st.integers(1, 8),
    constant=st.integers(1, 8),
)
def test_limits_hold(left: int, asked: int | None, most: int, constant: int) -> None:
    sequence = Sequence(left, SpeculationParams(num_assistant_tokens=asked))
    config = SpeculationConfig(num_assistant_tokens=constant, max_assistant_tokens=most)
    for lookahead in (ConstantLookahead(config), HeuristicLookahead(config), auto(most, FLAT, CHEAP)):
        assert 0 <= lookahead.counts([sequence])[0] <= min(asked or most, most, left - 1)  # type: ignore[list-item]


def test_a_request_may_ask_for_drafts_where_auto_would_not_and_refuse_them_where_it_would() -> None:
    asking = Sequence(speculation=SpeculationParams(num_assistant_tokens=2))
    refusing = Sequence(speculation=SpeculationParams(policy=SpeculationPolicy.OFF))
    assert auto(8, FLAT, FLAT).counts([asking, Sequence(), refusing]) == [2, 0, 0]
    assert auto(8, FLAT, CHEAP).counts([refusing]) == [0]


@given(st.integers(1, 200))
def test_costs_grow_between_and_beyond_what_was_measured(num_rows: int) -> None:
    costs = LiveCosts(ForwardCosts((1, 4, 16), (1.0, 2.0, 6.0)))
    assert costs.at(num_rows) <= costs.at(num_rows + 1)
    assert costs.at(0) == 0.0
    assert costs.at(4) == 2.0
    assert costs.at(10) == pytest.approx(4.0)
    assert costs.at(32) == pytest.approx(12.0)


def test_a_slower_machine_makes_all_forwards_slower() -> None:
    costs = LiveCosts(ForwardCosts((1, 4, 16), (1.0, 2.0, 6.0)))
    for _ in range(20):
        costs.observe(4, 2.0)
    for _ in range(40):
        costs.observe(4, 4.0)
    assert costs.pace == pytest.approx(2.0, rel=0.05)
    assert [costs.at(rows) for rows in (1, 4, 16)] == pytest.approx([2.0, 4.0, 12.0], rel=0.05)
    costs.observe(4, 1e6)  # a disturbed forward is little news
    assert costs.at(4) < 4.5


def test_what_forwards_of_one_size_take_beside_others_is_learnt() -> None:
    """Of what the start has said, one entry is wrong by half, and another is never seen."""
    costs = LiveCosts(ForwardCosts((1, 4, 16), (1.0, 2.0, 6.0)))
    for step in range(400):
        costs.observe(*((4, 3.0) if step % 8 else (1, 1.0)))
    assert costs.at(4) / costs.at(1) == pytest.approx(3.0, rel=0.05)
    before = costs.at(4), costs.at(16)
    costs.observe(5, 1.2 * costs.at(5))  # said of what lies beside it, by how near that is
    assert costs.at(4) / before[0] > costs.at(16) / before[1] > 1.0


def test_drafting_steps_are_calibrated_by_plain_ones() -> None:
    """What plain decoding costs is seen only by decoding plainly."""
    lookahead, sequence = auto(8, FLAT, CHEAP), Sequence(left=1000)
    steps = [lookahead.counts([sequence])[0] for _ in range(2 * CALIBRATE_EVERY)]
    assert steps.count(0) == 2 * len(CALIBRATE_AT)


def test_drafting_that_loses_the_race_pauses_ever_longer() -> None:
    """The costs promise a gain that steps do not bring: plain decoding is what remains, nearly always."""
    lookahead, running = auto(8, FLAT, CHEAP), [Sequence(left=10**6)]
    drafting = []
    for step in range(20 * PAUSE):
        depth = lookahead.counts(running)[0]
        drafting += [step] if depth else []
        advance = Advance([SampledToken(1)] * (1 + depth), num_drafted=depth, num_accepted=depth)
        slow_s = 3.0 * (1 + depth) if depth else 1.0
        lookahead.observe(StepOutcome(running, [advance], 0.0, slow_s))
    assert len(drafting) < 0.1 * 20 * PAUSE
    assert drafting[-1] - drafting[0] > PAUSE  # it was tried again


def test_a_plain_step_that_the_draft_made_slow_is_no_news_of_plain_decoding() -> None:
    """Forwards that follow the draft find its weights in the caches, and drafting at 0.8 of plain decoding
    loses, though it would win against a plain step among its own."""
    costs = costs_of(ForwardCosts((1, 2, 64), (1.0, 1.02, 30.0)), CHEAP)
    lookahead, running, drafting = AutoLookahead(1, costs), [Sequence(left=10**6)], []
    for step in range(40 * PAUSE):
        depth = lookahead.counts(running)[0]
        is_cold = bool(depth) or drafting[-1:] == [step - 1]
        drafting += [step] if depth else []
        advance = Advance([SampledToken(1)] * (1 + depth), num_drafted=depth, num_accepted=depth)
        outcome = StepOutcome(running, [advance], 0.05 * depth, 2.45 if is_cold else 1.0)
        costs.observe(outcome)
        lookahead.observe(outcome)
    assert len(drafting) < 0.1 * 40 * PAUSE


def test_drafting_that_wins_goes_on() -> None:
    lookahead, running = auto(8, FLAT, CHEAP), [Sequence(left=10**6)]
    num_plain = 0
    for _ in range(10 * CALIBRATE_EVERY):
        depth = lookahead.counts(running)[0]
        num_plain += depth == 0
        advance = Advance([SampledToken(1)] * (1 + depth), num_drafted=depth, num_accepted=depth)
        lookahead.observe(StepOutcome(running, [advance], 0.05 * depth, 1.0))
    assert num_plain == 10 * len(CALIBRATE_AT)
