"""The number of draft tokens is the one that pays, given costs and acceptance; limits always hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.lookahead import PROBE_EVERY, AutoLookahead, ConstantLookahead, StepOutcome
from tandem.config import SpeculationConfig
from tandem.engine.costs import ForwardCosts
from tandem.speculation import SpeculationParams, SpeculationPolicy

FLAT = ForwardCosts((1, 64), (1.0, 1.0))  # a forward costs the same whatever it holds
LINEAR = ForwardCosts((1, 64), (1.0, 64.0))  # each row costs as much as the first
CHEAP = ForwardCosts((1, 64), (0.05, 0.05))


@dataclass(frozen=True)
class Sequence:
    """What a look-ahead reads of a sequence."""

    left: int = 100
    speculation: SpeculationParams = field(default_factory=SpeculationParams)

    @property
    def work(self) -> object:
        return SimpleNamespace(speculation=self.speculation, max_tokens=self.left)

    @property
    def output(self) -> object:
        return SimpleNamespace(num_tokens=0)


def judged(accepted: int, rejected: int, *, verify_s: float = 1.0, rows: int = 4) -> StepOutcome:
    return StepOutcome(1, 3, rows, accepted + rejected, accepted, 0.15, verify_s)


def test_a_cheap_draft_beside_a_flat_target_drafts_far() -> None:
    assert AutoLookahead(8, FLAT, CHEAP).counts([Sequence()])[0] >= 3


@pytest.mark.parametrize(
    ("target", "draft"), [(FLAT, FLAT), (LINEAR, CHEAP)], ids=["dear draft", "dear rows"]
)
def test_where_drafting_cannot_pay_nothing_is_drafted(target: ForwardCosts, draft: ForwardCosts) -> None:
    lookahead = AutoLookahead(8, target, draft)
    assert lookahead.counts([Sequence()] * 4) == [0] * 4
    assert all(lookahead.gain(4, depth) < 1 for depth in range(1, 9))


def test_a_larger_batch_drafts_less() -> None:
    """Rows are free up to 8 and linear from there."""
    target = ForwardCosts((1, 8, 64), (1.0, 1.0, 8.0))
    depths = [AutoLookahead(8, target, CHEAP).counts([Sequence()] * batch)[0] for batch in (1, 2, 4, 32)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > 0 == depths[-1]


def test_acceptance_is_learnt_both_ways() -> None:
    lookahead = AutoLookahead(8, FLAT, CHEAP)
    before = lookahead.counts([Sequence()])[0]
    for _ in range(100):
        lookahead.observe(judged(0, 1))
    assert lookahead.acceptance < 0.05
    assert lookahead.counts([Sequence()])[0] < before
    for _ in range(100):
        lookahead.observe(judged(3, 0))
    assert lookahead.acceptance > 0.95
    assert lookahead.counts([Sequence()])[0] == 8


def test_costs_that_turn_out_higher_are_corrected() -> None:
    """Verification of many rows costs far more than measured at start: drafting stops."""
    lookahead = AutoLookahead(8, FLAT, CHEAP)
    slow_draft = StepOutcome(1, 3, 4, 2, 1, draft_s=6.0, verify_s=1.0)
    for _ in range(50):
        lookahead.observe(slow_draft)
    assert lookahead.counts([Sequence()]) == [0]


def test_plain_decoding_is_probed_now_and_then() -> None:
    lookahead = AutoLookahead(8, FLAT, FLAT)
    counts = [lookahead.counts([Sequence()])[0] for _ in range(3 * PROBE_EVERY)]
    assert counts.count(1) == 3
    assert counts.count(0) == len(counts) - 3


def test_a_small_difference_does_not_change_the_depth() -> None:
    lookahead = AutoLookahead(8, FLAT, CHEAP)
    depth = lookahead.counts([Sequence()])[0]
    lookahead.acceptance += 0.005
    assert lookahead.counts([Sequence()])[0] == depth


@given(
    left=st.integers(1, 20),
    asked=st.one_of(st.none(), st.integers(1, 15)),
    most=st.integers(1, 8),
    constant=st.integers(1, 8),
)
def test_limits_hold(left: int, asked: int | None, most: int, constant: int) -> None:
    sequence = Sequence(left, SpeculationParams(num_assistant_tokens=asked))
    fixed = ConstantLookahead(SpeculationConfig(num_assistant_tokens=constant, max_assistant_tokens=most))
    auto = AutoLookahead(most, FLAT, CHEAP)
    for lookahead in (fixed, auto):
        assert 0 <= lookahead.counts([sequence])[0] <= min(asked or most, most, left - 1)  # type: ignore[list-item]


def test_a_request_may_ask_for_drafts_where_auto_would_not_and_refuse_them_where_it_would() -> None:
    asking = Sequence(speculation=SpeculationParams(num_assistant_tokens=2))
    refusing = Sequence(speculation=SpeculationParams(policy=SpeculationPolicy.OFF))
    assert AutoLookahead(8, FLAT, FLAT).counts([asking, Sequence(), refusing]) == [2, 0, 0]
    assert AutoLookahead(8, FLAT, CHEAP).counts([refusing]) == [0]


@given(st.integers(1, 200))
def test_costs_grow_between_and_beyond_what_was_measured(num_rows: int) -> None:
    costs = ForwardCosts((1, 4, 16), (1.0, 2.0, 6.0))
    assert costs.at(num_rows) <= costs.at(num_rows + 1)
    assert costs.at(4) == 2.0
    assert costs.at(10) == pytest.approx(4.0)
    assert costs.at(32) == pytest.approx(12.0)
