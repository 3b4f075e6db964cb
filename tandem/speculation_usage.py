"""What speculation did: counts and times of one request, or of a whole worker. Knows no drafts and no models.

Acceptance is counted before stops cut the output, so that it tells of the draft and not of the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2
from tandem.speculation import MAX_ASSISTANT_TOKENS


def _lengths() -> list[int]:
    return [0] * MAX_ASSISTANT_TOKENS


@dataclass(slots=True)
class SpeculationUsage:
    """Sums over steps. A step is one verifying forward as seen by one sequence."""

    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_rollbacks: int = 0  # steps in which a draft token was rejected
    num_tau_stops: int = 0  # steps in which drafting ended because the draft was unsure
    runs_drafted: list[int] = field(default_factory=_lengths)  # steps by their number of draft tokens, from 1
    runs_accepted: list[int] = field(default_factory=_lengths)  # and of those that stood
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0  # what plain steps would have taken for the same tokens, by measured costs

    @property
    def drafted_at(self) -> list[int]:
        """Draft tokens by place in their run, the first one first."""
        return _places(self.runs_drafted)

    @property
    def accepted_at(self) -> list[int]:
        """Of `drafted_at`, how many stood."""
        return _places(self.runs_accepted)

    @property
    def num_rolled_back(self) -> int:
        """Draft tokens that were verified in vain."""
        return self.num_drafted - self.num_accepted

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted; 0 if nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def saved_s(self) -> float:
        """Estimated time won; negative where speculation cost more than it brought."""
        return self.plain_s - self.draft_s - self.verify_s

    def count(self, num_drafted: int, num_accepted: int, is_tau_stop: bool) -> None:
        """One step of one sequence."""
        self.num_steps += 1
        self.num_tau_stops += is_tau_stop
        if not num_drafted:
            return
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.num_rollbacks += num_accepted < num_drafted
        self.runs_drafted[num_drafted - 1] += 1
        if num_accepted:
            self.runs_accepted[num_accepted - 1] += 1

    def count_plain(self, num_steps: int, verify_s: float, plain_s: float) -> None:
        """Steps without a draft, and their time as `spend` takes it."""
        self.num_steps += num_steps
        self.verify_s += verify_s
        self.plain_s += plain_s

    def spend(self, draft_s: float, verify_s: float, plain_s: float) -> None:
        """The time of a step, and what its tokens would have taken plainly."""
        self.draft_s += draft_s
        self.verify_s += verify_s
        self.plain_s += plain_s

    def to_pb(self) -> pb.SpeculationUsage:
        """Places after the last drafted one are left out."""
        drafted_at = self.drafted_at
        used = sum(count > 0 for count in drafted_at)
        return pb.SpeculationUsage(
            steps=self.num_steps,
            drafted=self.num_drafted,
            accepted=self.num_accepted,
            rollbacks=self.num_rollbacks,
            tau_stops=self.num_tau_stops,
            drafted_at=drafted_at[:used],
            accepted_at=self.accepted_at[:used],
            draft_ms=1e3 * self.draft_s,
            verify_ms=1e3 * self.verify_s,
            plain_ms=1e3 * self.plain_s,
        )

    @classmethod
    def from_pb(cls, message: pb.SpeculationUsage) -> SpeculationUsage:
        return cls(
            num_steps=message.steps,
            num_drafted=message.drafted,
            num_accepted=message.accepted,
            num_rollbacks=message.rollbacks,
            num_tau_stops=message.tau_stops,
            runs_drafted=_runs(message.drafted_at),
            runs_accepted=_runs(message.accepted_at),
            draft_s=message.draft_ms / 1e3,
            verify_s=message.verify_ms / 1e3,
            plain_s=message.plain_ms / 1e3,
        )


def _places(runs: Sequence[int]) -> list[int]:
    """A run has one token at each place up to its length."""
    return list(accumulate(reversed(runs)))[::-1]


def _runs(places: Sequence[int]) -> list[int]:
    """Runs by their length, from tokens by place; those after the last that is given are none."""
    counts = [*places, *_lengths()][:MAX_ASSISTANT_TOKENS]
    return [count - after for count, after in zip(counts, [*counts[1:], 0], strict=True)]


@dataclass(frozen=True, slots=True)
class SpeculationReport:
    """What speculation earns on one worker."""

    usage: SpeculationUsage
    gain: float = 1.0  # tokens per second of late over those of plain decoding
    num_failures: int = 0  # drafts that raised
    alarm: str = ""  # why it cannot pay, if it cannot

    def to_pb(self) -> worker_pb2.SpeculationReport:
        return worker_pb2.SpeculationReport(
            usage=self.usage.to_pb(), gain=self.gain, failures=self.num_failures, alarm=self.alarm
        )

    @classmethod
    def from_pb(cls, message: worker_pb2.SpeculationReport) -> SpeculationReport:
        return cls(SpeculationUsage.from_pb(message.usage), message.gain, message.failures, message.alarm)
