"""Which side is short, and how many workers each side wants: pure functions of a snapshot.

Prefill is asked for in prompt tokens that wait to be computed, decode in KV blocks: those that admission
has given out and those that completions in the queue still need. Occupancy counts, not requests, as a
request of a hundred tokens and one of a hundred thousand are not the same load. Decode is also short when
too many tokens come later than the limit on inter-token latency, however much memory is left. Knows no
clock; whoever scales smooths over time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MAX_GROWTH = 1.5  # by latency, at once: how much a further worker helps is not known before it is there


class Advice(Enum):
    """What an operator with one more worker should do with it; the value is said to people."""

    BALANCED = "both sides have room"
    PREFILL = "prefill is short"
    DECODE = "decode is short"


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of each side, by one router's books."""

    num_prefill: float  # workers that take work; means over time are not whole numbers
    num_decode: float
    queued_tokens: float  # of prompts sent to prefill workers and not yet computed
    decode_blocks: float  # of all decode workers
    reserved_blocks: float  # of them, given out
    waiting_blocks: float  # at least so many are needed by the queue
    late_share: float = 0.0  # of gaps between tokens of late, those over the limit; 0 where there is none


@dataclass(frozen=True, slots=True)
class Targets:
    """What one worker should have to do."""

    queued_tokens: int = 2048  # per prefill worker: two full batches
    occupancy: float = 0.8  # of a decode worker's blocks
    late_share: float = 0.05  # of gaps between tokens, over router.itl_limit_s


def prefill_wanted(demand: Demand, targets: Targets) -> float:
    """Prefill workers, as a fraction; at least one does no harm."""
    return demand.queued_tokens / targets.queued_tokens


def decode_wanted(demand: Demand, targets: Targets) -> float:
    """Decode workers of today's size, as a fraction, by memory or by latency, whichever wants more.

    Without any there is no size to count by.
    """
    if not demand.num_decode or not demand.decode_blocks:
        return 1.0
    blocks_per_worker = demand.decode_blocks / demand.num_decode
    by_memory = (demand.reserved_blocks + demand.waiting_blocks) / (targets.occupancy * blocks_per_worker)
    by_latency = demand.num_decode * min(demand.late_share / targets.late_share, MAX_GROWTH)
    return max(by_memory, by_latency)


def advise(demand: Demand, targets: Targets) -> Advice:
    """The side whose workers have most to do, if that is more than they should."""
    prefill = prefill_wanted(demand, targets) / max(demand.num_prefill, 1)
    decode = decode_wanted(demand, targets) / max(demand.num_decode, 1)
    if max(prefill, decode) <= 1:
        return Advice.BALANCED
    return Advice.PREFILL if prefill > decode else Advice.DECODE
