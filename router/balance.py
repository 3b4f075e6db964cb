"""Which side is short, and how many workers each side wants: pure functions of a snapshot.

Prefill is asked for in prompt tokens that wait to be computed, decode in KV blocks: those that admission
has given out and those that completions in the queue still need. Occupancy counts, not requests, as a
request of a hundred tokens and one of a hundred thousand are not the same load. Knows no clock; whoever
scales smooths over time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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


@dataclass(frozen=True, slots=True)
class Targets:
    """What one worker should have to do."""

    queued_tokens: int = 2048  # per prefill worker: two full batches
    occupancy: float = 0.8  # of a decode worker's blocks


def prefill_wanted(demand: Demand, targets: Targets) -> float:
    """Prefill workers, as a fraction; at least one does no harm."""
    return demand.queued_tokens / targets.queued_tokens


def decode_wanted(demand: Demand, targets: Targets) -> float:
    """Decode workers of today's size, as a fraction; without any there is no size to count by."""
    if not demand.num_decode or not demand.decode_blocks:
        return 1.0
    blocks_per_worker = demand.decode_blocks / demand.num_decode
    return (demand.reserved_blocks + demand.waiting_blocks) / (targets.occupancy * blocks_per_worker)


def advise(demand: Demand, targets: Targets) -> Advice:
    """The side whose workers have most to do, if that is more than they should."""
    prefill = prefill_wanted(demand, targets) / max(demand.num_prefill, 1)
    decode = decode_wanted(demand, targets) / max(demand.num_decode, 1)
    if max(prefill, decode) <= 1:
        return Advice.BALANCED
    return Advice.PREFILL if prefill > decode else Advice.DECODE
