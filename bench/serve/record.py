"""What the client saw of one request. Times are seconds from the start of the run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Outcome(Enum):
    OK = "ok"
    FAILED = "failed"
    CANCELLED = "cancelled"  # by the load test itself


@dataclass(slots=True)
class RequestRecord:
    """One request's life. `arrivals` are the moments in which tokens came, and how many came together."""

    index: int
    scheduled_s: float
    sent_s: float
    prompt_tokens: int = 0
    max_tokens: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    end_s: float = 0.0
    outcome: Outcome = Outcome.FAILED
    error: str = ""  # the reason, where it failed
    output_tokens: int = 0
    stages_ms: dict[str, float] = field(default_factory=dict)  # as the service measured them
    drafted: int = 0
    accepted: int = 0
    digest: str = ""  # of the text
    cached_tokens: int = 0  # of the prompt, that were not computed again
    request_class: str = ""
    session: str = ""  # the conversation it is a turn of
    turn: int = 0

    @property
    def first_s(self) -> float | None:
        return self.arrivals[0][0] if self.arrivals else None

    @property
    def ttft_ms(self) -> float | None:
        """First token received minus scheduled arrival: what a user waits who comes when he comes."""
        return None if self.first_s is None else 1e3 * (self.first_s - self.scheduled_s)

    @property
    def ttft_sent_ms(self) -> float | None:
        """First token received minus the moment the request was really sent."""
        return None if self.first_s is None else 1e3 * (self.first_s - self.sent_s)

    @property
    def e2e_ms(self) -> float:
        """End minus scheduled arrival."""
        return 1e3 * (self.end_s - self.scheduled_s)

    @property
    def tpot_ms(self) -> float | None:
        """(end-to-end - TTFT) / (output tokens - 1); None below two tokens."""
        if self.ttft_ms is None or self.output_tokens < 2:
            return None
        return (self.e2e_ms - self.ttft_ms) / (self.output_tokens - 1)

    @property
    def itl_ms(self) -> list[float]:
        """Gaps between arrivals. Tokens that speculation brings together share one gap."""
        times = [when for when, _ in self.arrivals]
        return [1e3 * (later - earlier) for earlier, later in itertools.pairwise(times)]

    @property
    def lag_ms(self) -> float:
        """Sent minus scheduled: the client's own delay."""
        return 1e3 * (self.sent_s - self.scheduled_s)

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "scheduled_s": round(self.scheduled_s, 6),
            "sent_s": round(self.sent_s, 6),
            "end_s": round(self.end_s, 6),
            "outcome": self.outcome.value,
            "error": self.error,
            "prompt_tokens": self.prompt_tokens,
            "max_tokens": self.max_tokens,
            "output_tokens": self.output_tokens,
            "arrivals": [[round(when, 6), count] for when, count in self.arrivals],
            "stages_ms": self.stages_ms,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "digest": self.digest,
            "cached_tokens": self.cached_tokens,
            "request_class": self.request_class,
            "session": self.session,
            "turn": self.turn,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RequestRecord:
        arrivals = [(float(when), int(count)) for when, count in values["arrivals"]]
        return cls(**{**values, "arrivals": arrivals, "outcome": Outcome(values["outcome"])})
