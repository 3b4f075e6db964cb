"""`router.disaggregate`: whether a prompt is prefilled on a worker of its own, or where it is decoded.

The split pays by keeping long prompts out of the way of running sequences. A short prompt may cost less
where it will be decoded: no other queue, no hand-off. What each way costs is learnt from the requests that
went it, so the first ones are split. Both costs are seconds of somebody's time until the sequence runs.
Neither side computes what the store has, which both restore, nor a decode worker what it kept itself:

    split: (tokens queued before it at the prefill worker + own) · s per token + hand-off
    local: (tokens queued before it at the decode worker + own · (1 + sequences that run there and wait
           meanwhile)) · s per token

Where both workers share their cores, there is nothing to compare as long as prompts can be computed between
steps in chunks that nobody notices. With n sequences running, the split takes half of their cores for twice
as long: they lose n · own · s, as they do otherwise, and the prompt itself another own · s and the hand-off.
What nobody notices follows from `router.itl_limit_s`, the longest gap between tokens that is asked for. Where
even the shortest chunk is more than that leaves, prompts of several chunks are split, whatever it costs: who
comes while one is computed would wait too long for each of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from math import inf

from router.decode_loads import DecodeLoads
from tandem.request import Timings
from tandem.token_cost import LEAST_CHUNK_TOKENS

ALPHA = 0.2  # weight of the newest measurement
MIN_MEASURED = 3  # requests of the split way before anything is compared
UNNOTICED_S = 0.06  # that the shortest chunk may take on shared cores where no limit is set,
UNNOTICED_SHARE = 0.85  # and of what a limit leaves beside a step
STEP_S, STEP_SHARE = 0.03, 0.5  # such a step, but not more of a limit than that


class Why(Enum):
    """The reasons of a decision."""

    ALWAYS = "always"  # router.disaggregate
    NEVER = "never"
    LONG = "long"  # more tokens to compute there than router.local_prefill_tokens
    CACHEABLE = (
        "cacheable"  # its beginning is nowhere yet, and only the split leaves it in the store for others
    )
    UNMEASURED = "unmeasured"  # nothing to compare yet
    NOTICED = "noticed"  # by those who asked for short gaps: its chunks there would be
    SHARED = "shared"  # by both workers: the cores, of which the split has no more to offer
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

    def left_at_prefill(self, tokens: int) -> int:
        """To be computed of a prompt: the last token always is."""
        return max(tokens - self.in_store, 1)

    def left_at_decode(self, tokens: int) -> int:
        """The same where it is decoded, which restores from the store too."""
        return max(tokens - max(self.in_store, self.at_decode), 1)


NOTHING = Cached()


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known when a request is admitted."""

    tokens: int  # of the prompt
    prefill_queue: int = 0  # tokens to be computed before it at the prefill worker
    local_queue: int = 0  # and at the decode worker
    num_running: int = 0  # sequences there that wait while it is computed
    cached: Cached = NOTHING
    shares_cores: bool = False  # the two workers, with each other
    token_s: float = 0.0  # that a token takes the decode worker with all cores, as it says; 0: it does not


@dataclass(slots=True)
class Costs:
    """Seconds, as measured so far. 0: not yet."""

    split_s_per_token: float = 0.0
    handoff_s: float = 0.0
    local_s_per_token: float = 0.0

    def split_s(self, situation: Situation) -> float:
        tokens = situation.prefill_queue + situation.cached.left_at_prefill(situation.tokens)
        return tokens * self.split_s_per_token + self.handoff_s

    def local_s(self, situation: Situation) -> float:
        own_tokens = situation.cached.left_at_decode(situation.tokens)
        return (situation.local_queue + own_tokens * (1 + situation.num_running)) * self._local_token_s

    def stall_s(self, situation: Situation) -> float:
        """That running sequences wait for a chunk of a prompt between their steps, at the least."""
        return LEAST_CHUNK_TOKENS * (situation.token_s or self._local_token_s)

    @property
    def _local_token_s(self) -> float:
        return self.local_s_per_token or self.split_s_per_token

    def prefer_local(self, situation: Situation) -> bool:
        return self.local_s(situation) < self.split_s(situation)


def decide(
    situation: Situation,
    costs: Costs,
    num_measured: int,
    most_tokens: int,
    unnoticed_s: float = UNNOTICED_S,
    most_s: float = inf,
) -> Decision:
    """A decode worker computes at most `most_tokens`. Its sequences may wait `unnoticed_s` for a chunk where
    a prefill worker would take their cores, and not longer than `most_s` for any."""
    own_tokens, stall_s = situation.cached.left_at_decode(situation.tokens), costs.stall_s(situation)
    if own_tokens > most_tokens:
        return Decision(False, Why.LONG)
    if situation.cached.is_nowhere:
        return Decision(False, Why.CACHEABLE)
    if num_measured < MIN_MEASURED:
        return Decision(False, Why.UNMEASURED)
    if situation.shares_cores and stall_s <= unnoticed_s:
        return Decision(True, Why.SHARED)
    if stall_s > most_s and own_tokens > LEAST_CHUNK_TOKENS:
        return Decision(False, Why.NOTICED)
    is_local = costs.prefer_local(situation)
    without = costs.prefer_local(replace(situation, cached=NOTHING))
    return Decision(is_local, Why.CHEAPER if is_local == without else Why.CACHED)


class Disaggregation:
    """Decides for one router, and learns. `mode` is always, auto or never; gaps between tokens should not be
    longer than `itl_limit_s`, if that is not 0."""

    def __init__(self, mode: str, most_tokens: int, itl_limit_s: float = 0.0) -> None:
        self._fixed = {"always": SPLIT, "never": UNSPLIT}.get(mode)
        self._most_tokens = most_tokens
        left_s = UNNOTICED_SHARE * (itl_limit_s - min(STEP_S, STEP_SHARE * itl_limit_s))
        self._stalls_s = (left_s, left_s) if itl_limit_s else (UNNOTICED_S, inf)
        self._costs = Costs()
        self._num_measured = 0
        self.loads = DecodeLoads()

    def decide(
        self,
        tokens: int,
        prefill_queue: int,
        decode_worker: str,
        cached: Cached = NOTHING,
        *,
        shares_cores: bool = False,
        token_s: float = 0.0,
    ) -> Decision:
        if self._fixed is not None:
            return self._fixed
        before = self.loads.tokens_before(decode_worker, cached.left_at_decode(tokens))
        there = before, self.loads.num_running(decode_worker)
        situation = Situation(tokens, prefill_queue, *there, cached, shares_cores, token_s)
        return decide(situation, self._costs, self._num_measured, self._most_tokens, *self._stalls_s)

    def note(self, decision: Decision, tokens: int, timings: Timings) -> None:
        """A request that went this way has ended; its first token came after that many were computed, those
        queued before it too."""
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
