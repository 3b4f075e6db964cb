"""`router.disaggregate`: whether a prompt is prefilled on a worker of its own, or where it is decoded.

The split pays by keeping long prompts out of the way of running sequences. A short prompt may cost less
where it will be decoded: no other queue, no hand-off. What each way costs is learnt from the requests that
went it, so the first ones are split. Both costs are seconds of somebody's time until the sequence runs:

    split: (tokens that wait at the prefill worker, these included) · s per token + hand-off
    local: tokens · s per token · (1 + sequences that run there and wait meanwhile)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

from tandem.request import Timings

ALPHA = 0.2  # weight of the newest measurement
MIN_MEASURED = 3  # requests of the split way before anything is compared


class Why(Enum):
    """The reasons of a decision."""

    ALWAYS = "always"  # router.disaggregate
    NEVER = "never"
    LONG = "long"  # the prompt has more tokens than router.local_prefill_tokens
    CACHED = "cached"  # its beginning may be in the store, which decode workers do not ask
    UNMEASURED = "unmeasured"  # nothing to compare yet
    CHEAPER = "cheaper"  # this way
    STORE_DOWN = "store-down"  # there is no other way


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a prompt is prefilled."""

    is_local: bool
    why: Why

    @property
    def name(self) -> str:
        """As metrics and timings show it: `split/long`."""
        return f"{'local' if self.is_local else 'split'}/{self.why.value}"


STAY = Decision(True, Why.STORE_DOWN)
SPLIT = Decision(False, Why.ALWAYS)
UNSPLIT = Decision(True, Why.NEVER)


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known when a request is admitted."""

    tokens: int  # to be prefilled
    waiting_tokens: int  # at the prefill worker, these included
    num_running: int  # sequences on the decode worker, without this one


@dataclass(slots=True)
class Costs:
    """Seconds, as measured so far. 0: not yet."""

    split_s_per_token: float = 0.0
    handoff_s: float = 0.0
    local_s_per_token: float = 0.0

    def split_s(self, situation: Situation) -> float:
        return situation.waiting_tokens * self.split_s_per_token + self.handoff_s

    def local_s(self, situation: Situation) -> float:
        per_token = self.local_s_per_token or self.split_s_per_token
        return situation.tokens * per_token * (1 + situation.num_running)


def decide(
    situation: Situation, costs: Costs, num_measured: int, most_tokens: int, cacheable_tokens: float
) -> Decision:
    """`most_tokens` has the longest prompt that may stay; one above `cacheable_tokens` may be cached."""
    if situation.tokens > most_tokens:
        return Decision(False, Why.LONG)
    if situation.tokens > cacheable_tokens:
        return Decision(False, Why.CACHED)
    if num_measured < MIN_MEASURED:
        return Decision(False, Why.UNMEASURED)
    return Decision(costs.local_s(situation) < costs.split_s(situation), Why.CHEAPER)


class Disaggregation:
    """Decides for one router, and learns. `mode` is always, auto or never; longer prompts than
    `cacheable_tokens` may be cached in the store."""

    def __init__(self, mode: str, most_tokens: int, cacheable_tokens: float) -> None:
        self._fixed = {"always": SPLIT, "never": UNSPLIT}.get(mode)
        self._most_tokens = most_tokens
        self._cacheable_tokens = cacheable_tokens
        self._costs = Costs()
        self._num_measured = 0
        self._running: Counter[str] = Counter()  # by decode worker

    def decide(self, tokens: int, waiting_tokens: int, decode_worker: str) -> Decision:
        if self._fixed is not None:
            return self._fixed
        situation = Situation(tokens, waiting_tokens, self._running[decode_worker])
        limits = self._most_tokens, self._cacheable_tokens
        return decide(situation, self._costs, self._num_measured, *limits)

    def begin(self, decode_worker: str) -> None:
        """A request is admitted to this worker."""
        self._running[decode_worker] += 1

    def end(self, decode_worker: str) -> None:
        """It has left."""
        self._running[decode_worker] -= 1
        if not self._running[decode_worker]:
            del self._running[decode_worker]

    def note(self, decision: Decision, tokens: int, timings: Timings) -> None:
        """A request that went this way has ended; its first token came after that many, waiting ones too."""
        costs, per_token = self._costs, timings.prefill_ms / 1e3 / tokens
        if decision.is_local:
            costs.local_s_per_token = _mixed(costs.local_s_per_token, per_token)
            return
        waited_ms = timings.kv_write_ms + timings.kv_wait_ms + timings.kv_read_ms
        costs.split_s_per_token = _mixed(costs.split_s_per_token, per_token)
        costs.handoff_s = _mixed(costs.handoff_s, waited_ms / 1e3)
        self._num_measured += 1


def _mixed(known: float, new: float) -> float:
    return known + ALPHA * (new - known) if known else new
