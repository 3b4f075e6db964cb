"""What is said of a draft that cannot pay, and that plain time is told apart from time spent on drafts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from decode_worker.decoder import Advance
from decode_worker.earnings import CHECK_EVERY, Earnings
from decode_worker.lookahead import StepOutcome
from decode_worker.step_costs import DraftCosts, StepCosts
from tandem.engine.costs import ForwardCosts
from tandem.engine.sampler import SampledToken
from tandem.speculation_usage import SpeculationUsage

MOST = 8


def earnings(draft_s: float) -> Earnings:
    """A forward of the target takes a second, however many rows it has."""
    flat = ForwardCosts((1, 64), (1.0, 1.0))
    return Earnings(StepCosts(flat, DraftCosts(0.0, ForwardCosts((1, 64), (draft_s, draft_s)))), MOST)


def draft(told: Earnings, depth: int, right_every: float, draft_s: float, steps: int = CHECK_EVERY) -> None:
    """Steps of one sequence: one in `right_every` has all its draft tokens accepted, the others none."""
    sequence = SimpleNamespace(speculated=SpeculationUsage())
    for step in range(1, steps + 1):
        accepted = depth if step % right_every < 1 else 0
        tokens = [SampledToken(1)] * (1 + accepted)
        advance = Advance(tokens, num_drafted=depth, num_accepted=accepted)
        told.observe(StepOutcome([sequence], [advance], depth * draft_s, 1.0), depth * draft_s)


@pytest.mark.parametrize(
    ("draft_s", "depth", "right_every", "alarm"),
    [
        (0.05, 4, 1.25, ""),
        (0.7, 1, 1.7, "the draft cannot pay: 59% of its tokens are accepted, 70% are needed"),
        (0.7, 4, 50, "the draft hardly ever agrees (7% of its tokens are accepted, 70% are needed)"),
        (1.2, 4, 1.25, "the draft cannot pay: it costs too much beside the target at any acceptance"),
    ],
)
def test_a_draft_that_cannot_pay_is_told_what_is_wrong(draft_s, depth, right_every, alarm) -> None:
    told = earnings(draft_s)
    draft(told, depth, right_every, draft_s)
    assert told.report().alarm.startswith(alarm)
    assert bool(told.alarm) == bool(alarm)
    draft(told, depth, 1, draft_s, 20 * CHECK_EVERY)  # always right from now on
    assert told.alarm == ("" if draft_s < 1 else alarm)


def test_the_live_gain_is_of_late_and_plain_steps_told_together_count_each() -> None:
    told, together = earnings(0.1), earnings(0.1)
    sequence = SimpleNamespace(speculated=SpeculationUsage())
    for _ in range(16):
        told.observe(StepOutcome([sequence], [Advance([SampledToken(1)])], 0.0, 2.0), 0.0)
    together.observe(StepOutcome([sequence], [Advance([SampledToken(1)])], 0.0, 2.0, 16), 0.0)
    assert together.usage == told.usage
    assert together.usage.num_steps == 16
    assert together.gain == pytest.approx(told.gain) == pytest.approx(0.5)
    draft(told, 4, 1, 0.1, 1000)
    assert told.gain == pytest.approx(5 / 1.4, rel=0.01)
