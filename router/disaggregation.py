"""`router.disaggregate`: whether a prompt is prefilled on a worker of its own, or where it is decoded.

The split pays by keeping long prompts out of the way of running sequences. A short prompt may cost less
where it will be decoded: no other queue, no hand-off. What each way costs is learnt from the requests that
went it, so the first ones are split. Both costs are seconds of somebody's time until the sequence runs, and
neither side computes what it has cached:

    split: (tokens that wait at the prefill worker, these included, less cached ones) · s per token + hand-off
    local: (tokens, less kept ones) · s per token · (1 + sequences that run there and wait meanwhile)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum

from tandem.request import Timings

ALPHA = 0.2  # weight of the newest measurement
MIN_MEASURED = 3  # requests of the split way before anything is compared


class Why(Enum):
    """The reasons of a decision."""

    ALWAYS = "always"  # router.disaggregate
    NEVER = "never"
    LONG = "long"  # more tokens to compute there than router.local_prefill_tokens
    CACHEABLE = (
        "cacheable"  # its beginning is nowhere yet, and only the split leaves it in the store for others
    )
    UNMEASURED = "unmeasured"  # nothing to compare yet
    CHEAPER = "cheaper"  # this way
    CACHED = "cached"  # cheaper this way for what is cached there, and otherwise not
    STORE_DOWN = "store-down"  # there is no other way
    NO_PREFILL = "no-prefill"  # nor here: every prefill worker is lost


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
ALONE = Decision(True, Why.NO_PREFILL)
SPLIT = Decision(False, Why.ALWAYS)
UNSPLIT = Decision(True, Why.NEVER)


@dataclass(frozen=True, slots=True)
class Cached:
    """How much of a prompt's beginning is thought to be where, in tokens."""

    in_store: int = 0
    at_decode: int = 0  # in blocks that the decode worker kept
    wanted: int = 0  # in the store, for later prompts

    @property
    def is_nowhere(self) -> bool:
        """Whether some of what later prompts might use is in neither place."""
        return max(self.in_store, self.at_decode) < self.wanted


NOTHING = Cached()


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known when a request is admitted."""

    tokens: int  # to be prefilled, or to be found
    waiting_tokens: int  # at the prefill worker, these included
    num_running: int  # sequences on the decode worker, without this one
    cached: Cached = NOTHING

    @property
    def local_tokens(self) -> int:
        """To be computed on the decode worker: the last one always is."""
        return max(self.tokens - self.cached.at_decode, 1)


@dataclass(slots=True)
class Costs:
    """Seconds, as measured so far. 0: not yet."""

    split_s_per_token: float = 0.0
    handoff_s: float = 0.0
    local_s_per_token: float = 0.0

    def split_s(self, situation: Situation) -> float:
        tokens = situation.waiting_tokens - min(situation.cached.in_store, situation.tokens - 1)
        return tokens * self.split_s_per_token + self.handoff_s

    def local_s(self, situation: Situation) -> float:
        per_token = self.local_s_per_token or self.split_s_per_token
        return situation.local_tokens * per_token * (1 + situation.num_running)

    def prefer_local(self, situation: Situation) -> bool:
        return self.local_s(situation) < self.split_s(situation)


def decide(situation: Situation, costs: Costs, num_measured: int, most_tokens: int) -> Decision:
    """At most `most_tokens` are computed on a decode worker."""
    if situation.local_tokens > most_tokens:
        return Decision(False, Why.LONG)
    if situation.cached.is_nowhere:
        return Decision(False, Why.CACHEABLE)
    if num_measured < MIN_MEASURED:
        return Decision(False, Why.UNMEASURED)
    is_local = costs.prefer_local(situation)
    without = costs.prefer_local(replace(situation, cached=NOTHING))
    return Decision(is_local, Why.CHEAPER if is_local == without else Why.CACHED)


class Disaggregation:
    """Decides for one router, and learns. `mode` is always, auto or never."""

    def __init__(self, mode: str, most_tokens: int) -> None:
        self._fixed = {"always": SPLIT, "never": UNSPLIT}.get(mode)
        self._most_tokens = most_tokens
        self._costs = Costs()
        self._num_measured = 0
        self._running: Counter[str] = Counter()  # by decode worker

    def decide(
        self, tokens: int, waiting_tokens: int, decode_worker: str, cached: Cached = NOTHING
    ) -> Decision:
        if self._fixed is not None:
            return self._fixed
        situation = Situation(tokens, waiting_tokens, self._running[decode_worker], cached)
        return decide(situation, self._costs, self._num_measured, self._most_tokens)

    def begin(self, decode_worker: str) -> None:
        """A request is admitted to this worker."""
        self._running[decode_worker] += 1

    def end(self, decode_worker: str) -> None:
        """It has left."""
        self._running[decode_worker] -= 1
        if not self._running[decode_worker]:
            del self._running[decode_worker]

    def note(self, decision: Decision, tokens: int, timings: Timings) -> None:
        """A request that went this way has ended; its first token came after that many were computed, those
        that waited before it too."""
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
