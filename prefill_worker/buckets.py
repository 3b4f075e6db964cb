"""Which prompts go together: similar lengths, within a token budget, after a short adaptive wait.

The oldest prompt anchors a batch; prompts of similar length join it whatever their place in line,
so padding is bounded by the tolerance and nobody waits behind an unlike neighbour. A prompt that finds
no memory is passed by those behind it, but not for ever. Pure: no clock of its own, no tensors, no threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prefill_worker.job import PrefillJob
from tandem.config import PrefillConfig

GAP_SMOOTHING = 0.2
HURRY = 10  # a prompt with less than this many waits left until its deadline does not wait at all
MAX_GAP = 10  # a longer pause than this many waits teaches nothing more about the burst after it
MAX_OVERTAKEN = 16  # batches that may pass a prompt without memory before memory is left to collect for it


class LengthBuckets:
    """The prompts that wait for their first chunk."""

    def __init__(self, config: PrefillConfig) -> None:
        self._config = config
        self._waiting: list[PrefillJob] = []  # in order of arrival
        self._last_arrival_s: float | None = None
        self._mean_gap_s = MAX_GAP * config.max_wait_s

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        return sum(job.num_tokens for job in self._waiting)

    def __iter__(self) -> Iterator[PrefillJob]:
        return iter(self._waiting)

    def next_deadline_s(self) -> float:
        """When the first waiting prompt runs out of time."""
        return min(job.work.deadline_s for job in self._waiting)

    def add(self, job: PrefillJob) -> None:
        """Put a prompt in line and learn how fast prompts arrive."""
        if self._last_arrival_s is not None:
            gap_s = min(max(job.arrived_s - self._last_arrival_s, 0.0), MAX_GAP * self._config.max_wait_s)
            self._mean_gap_s += GAP_SMOOTHING * (gap_s - self._mean_gap_s)
        self._last_arrival_s = job.arrived_s
        self._waiting.append(job)

    def drop(self, is_gone: Callable[[PrefillJob], bool]) -> list[PrefillJob]:
        """Take out the prompts nobody waits for any more."""
        gone = [job for job in self._waiting if is_gone(job)]
        if gone:
            self._waiting = [job for job in self._waiting if job not in gone]
        return gone

    def due_s(self, now_s: float) -> float | None:
        """When the next batch should start: None if nobody waits, `now_s` or earlier means at once.

        Waiting pays only if another prompt is likely to arrive within the wait.
        """
        if not self._waiting:
            return None
        oldest, wait_s = self._waiting[0], self._config.max_wait_s
        in_hurry = self.next_deadline_s() - now_s < HURRY * wait_s
        if self._mean_gap_s > wait_s or in_hurry or self._is_full(self._members(oldest)):
            return now_s
        return oldest.arrived_s + wait_s

    def can_start_any(self, fits: Callable[[PrefillJob], bool]) -> bool:
        """Whether `next_batch` would find a prompt that fits."""
        return any(fits(job) for job in self._line())

    def next_batch(self, can_start: Callable[[PrefillJob], bool]) -> list[PrefillJob]:
        """Remove and return the next batch; `can_start` takes memory for one prompt or says no.

        A prompt without memory stops nobody behind it: the next oldest anchors instead.
        """
        passed = []
        for anchor in self._line():
            if not can_start(anchor):
                passed.append(anchor)
                continue
            company = (job for job in self._members(anchor) if job is not anchor and job not in passed)
            batch = [anchor, *(job for job in company if can_start(job))]
            self._waiting = [job for job in self._waiting if job not in batch]
            for job in passed:
                job.num_overtaken += 1
            return batch
        return []

    def _line(self) -> list[PrefillJob]:
        """Who may start now: nobody behind a prompt that was passed too often."""
        stuck = (place for place, job in enumerate(self._waiting, 1) if job.num_overtaken >= MAX_OVERTAKEN)
        return self._waiting[: next(stuck, None)]

    def _members(self, anchor: PrefillJob) -> list[PrefillJob]:
        """The anchor, then the prompts of similar length that fit beside it, closest first."""
        others = [job for job in self._line() if job is not anchor]
        others.sort(key=lambda job: abs(job.num_tokens - anchor.num_tokens))
        members, shortest, longest = [anchor], anchor.num_tokens, anchor.num_tokens
        for job in others:
            low, high = min(shortest, job.num_tokens), max(longest, job.num_tokens)
            similar = low >= (1 - self._config.bucket_tolerance) * high
            if similar and self._has_place(len(members), high):
                members.append(job)
                shortest, longest = low, high
        return members

    def _has_place(self, num_members: int, longest: int) -> bool:
        """Whether one more prompt fits beside that many, padded to `longest` each."""
        within = (num_members + 1) * longest <= self._config.token_budget
        return within and num_members < self._config.max_batch

    def _is_full(self, batch: list[PrefillJob]) -> bool:
        return not self._has_place(len(batch), max(job.num_tokens for job in batch))
