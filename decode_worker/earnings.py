"""What speculation earns on this worker, and the alarm when it cannot."""

from __future__ import annotations

import logging
import time

from decode_worker.lookahead import StepOutcome
from decode_worker.step_costs import StepCosts
from tandem.speculation_usage import SpeculationReport, SpeculationUsage

log = logging.getLogger(__name__)

FADE = 0.99  # weight of the past in the live gain, per step
MIN_JUDGED = 200  # draft tokens before anybody is alarmed
CHECK_EVERY = 1024  # steps
ALARM_EVERY_S = 600.0
SELDOM = 2.0  # a draft that agrees less often than needed by this or its depth is taken for another model's


class Earnings:
    """Counts of one decode worker. Written by the step thread, read by any."""

    def __init__(self, costs: StepCosts | None, most: int) -> None:
        self.usage = SpeculationUsage()
        self.num_failures = 0  # drafts that raised
        self.alarm = ""
        self._costs = costs
        self._most = most
        self._plain_s = self._spent_s = 0.0  # both fade
        self._next_alarm_s = 0.0

    @property
    def gain(self) -> float:
        """Tokens per second of late over those of plain decoding; 1 while nothing is known."""
        return self._plain_s / self._spent_s if self._spent_s > 0 else 1.0

    def plain_s(self, num_sequences: int) -> float:
        """Seconds of a plain step; 0 where costs are not known."""
        return self._costs.plain_s(num_sequences) if self._costs else 0.0

    def report(self) -> SpeculationReport:
        return SpeculationReport(self.usage, self.gain, self.num_failures, self.alarm)

    def observe(self, outcome: StepOutcome, draft_s: float) -> None:
        """A step; `draft_s` is all the time the draft took. If it was asked, requests are told, too; their
        plain steps are counted as they come (plain_run.py)."""
        count, num_steps = len(outcome.advances), outcome.num_steps
        plain_step_s = self.plain_s(count) or outcome.verify_s
        verify_s = num_steps * outcome.verify_s
        plain_s = num_steps * plain_step_s * outcome.num_tokens / count
        if draft_s:
            self._count_drafting(outcome, draft_s, plain_step_s)
            self.usage.spend(draft_s, verify_s, plain_s)
        else:
            self.usage.count_plain(num_steps * count, verify_s, plain_s)
        fade = FADE**num_steps
        self._plain_s = fade * self._plain_s + plain_s
        self._spent_s = fade * self._spent_s + draft_s + verify_s
        is_due = self.usage.num_steps % CHECK_EVERY < num_steps * count
        if self._costs and is_due and self.usage.num_drafted >= MIN_JUDGED:
            self._check(self._costs)

    def _count_drafting(self, outcome: StepOutcome, draft_s: float, plain_step_s: float) -> None:
        for sequence, advance in zip(outcome.sequences, outcome.advances, strict=True):
            for usage in (sequence.speculated, self.usage):
                usage.count(advance.num_drafted, advance.num_accepted, advance.is_tau_stop)
            sequence.speculated.spend(draft_s, outcome.verify_s, plain_step_s * len(advance.tokens))

    def _check(self, costs: StepCosts) -> None:
        """Whether drafting can pay for a lone sequence, where it is worth the most."""
        usage = self.usage
        judged = usage.num_accepted + usage.num_rollbacks
        acceptance = usage.num_accepted / judged if judged else 0.0
        if costs.best_gain(acceptance, 1, self._most) > 1:
            self.alarm = ""
            return
        needed = costs.needed_acceptance(1, self._most)
        depth = usage.num_drafted / max(usage.drafted_at[0], 1)
        share = f"{acceptance:.0%} of its tokens are accepted, {needed:.0%} are needed"
        if needed >= 1:
            self.alarm = "the draft cannot pay: it costs too much beside the target at any acceptance"
        elif acceptance * max(depth, SELDOM) <= needed:
            self.alarm = f"the draft hardly ever agrees ({share}): is it meant for this target?"
        else:
            self.alarm = f"the draft cannot pay: {share}"
        if time.monotonic() >= self._next_alarm_s:
            self._next_alarm_s = time.monotonic() + ALARM_EVERY_S
            log.warning("speculation: %s", self.alarm)
