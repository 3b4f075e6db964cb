"""Which worker gets the next request: pure functions of a snapshot.

Candidates are workers that can take the request now; the caller has made sure of that. A policy
keeps no state and reads no clock, so the same snapshot always gives the same answer, and ties go to
the smaller worker id. It does not know what a request, a credit or a connection is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as a policy sees it, by the router's own books."""

    worker_id: str
    num_blocks: int
    free_blocks: int
    queued_tokens: int = 0  # prompt tokens sent to it and not yet computed


class RoutingPolicy(Protocol):
    """Chooses one of several workers that all fit. `candidates` is never empty."""

    def pick_prefill(self, candidates: Sequence[Candidate]) -> Candidate: ...

    def pick_decode(self, candidates: Sequence[Candidate]) -> Candidate: ...


def fewest_queued_tokens(candidates: Sequence[Candidate]) -> Candidate:
    """The worker that reaches a new prompt first, as the time of a prefill grows with its tokens."""
    return min(candidates, key=lambda c: (c.queued_tokens, c.worker_id))


def largest_free_share(candidates: Sequence[Candidate]) -> Candidate:
    """The worker with most free blocks relative to its size, so that unequal workers fill evenly."""
    return min(candidates, key=lambda c: (-c.free_blocks / c.num_blocks, c.worker_id))


class LeastLoaded:
    """The default policy: the shortest prefill queue, the emptiest decode pool."""

    def pick_prefill(self, candidates: Sequence[Candidate]) -> Candidate:
        return fewest_queued_tokens(candidates)

    def pick_decode(self, candidates: Sequence[Candidate]) -> Candidate:
        return largest_free_share(candidates)
