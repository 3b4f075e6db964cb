"""Which worker gets the next request: pure functions of what a worker has in hand.

A policy keeps no state and reads no clock, and a worker's key depends on that worker alone, so that a fleet
can keep its workers in order. It does not know what a request, a credit or a connection is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from router.ranking import Key


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as a policy sees it, by the router's own books."""

    worker_id: str
    num_blocks: int
    free_blocks: int
    queued_tokens: int = 0  # prompt tokens sent to it and not yet computed


class RoutingPolicy(Protocol):
    """Ranks workers that all fit: the lowest key is taken first, ties go to the smaller worker id."""

    def prefill_key(self, candidate: Candidate) -> Key: ...

    def decode_key(self, candidate: Candidate) -> Key: ...


class LeastLoaded:
    """The default policy."""

    def prefill_key(self, candidate: Candidate) -> Key:
        """The shortest queue in tokens reaches a new prompt first: the time of a prefill grows with them."""
        return (candidate.queued_tokens,)

    def decode_key(self, candidate: Candidate) -> Key:
        """Most free blocks relative to its size first, so that unequal workers fill evenly."""
        return (-candidate.free_blocks / candidate.num_blocks,)
