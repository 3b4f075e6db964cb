"""Which prompts go together: similar lengths, within a token budget, after a short adaptive wait.

The oldest prompt anchors a batch; prompts of similar length join it whatever their place in line,
so padding is bounded by the tolerance and nobody waits behind an unlike neighbour. Pure: no clock of
its own, no tensors, no threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prefill_worker.job import PrefillJob
from tandem.config import PrefillConfig

GAP_SMOOTHING = 0.2
HURRY = 10  # a prompt with less than this many waits left until its deadline does not wait at all


class LengthBuckets:
    """The prompts that wait for their first chunk."""

    def __init__(self, config: PrefillConfig) -> None:
        self._config = config
        self._waiting: list[PrefillJob] = []  # in order of arrival
        self._last_arrival_s: float | None = None
        self._mean_gap_s = float("inf")

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
            gap_s = max(job.arrived_s - self._last_arrival_s, 0.0)
            old_s = self._mean_gap_s if self._mean_gap_s != float("inf") else gap_s
            self._mean_gap_s = old_s + GAP_SMOOTHING * (gap_s - old_s)
        self._last_arrival_s = job.arrived_s
        self._waiting.append(job)

    def drop(self, is_gone: Callable[[PrefillJob], bool]) -> list[PrefillJob]:
        """Take out the prompts nobody waits for any more."""
        gone = [job for job in self._waiting if is_gone(job)]
        if gone:
            self._waiting = [job for job in self._waiting if not is_gone(job)]
        return gone

    def due_s(self, now_s: float) -> float | None:
        """When the next batch should start: None if nobody waits, `now_s` or earlier means at once.

        Waiting pays only if another prompt is likely to arrive within the wait.
        """
        if not self._waiting:
            return None
        oldest, wait_s = self._waiting[0], self._config.max_wait_s
        time_left_s = oldest.work.deadline_s - now_s
        if self._mean_gap_s > wait_s or time_left_s < HURRY * wait_s or self._is_full(self._members(oldest)):
            return now_s
        return oldest.arrived_s + wait_s

    def next_batch(self, can_start: Callable[[PrefillJob], bool]) -> list[PrefillJob]:
        """Remove and return the next batch; `can_start` takes memory for one prompt or says no.

        A prompt without memory stops nobody behind it: the next oldest anchors instead.
        """
        for anchor in self._waiting:
            if can_start(anchor):
                batch = [anchor]
                for job in self._members(anchor)[1:]:
                    if self._fits(batch, job) and can_start(job):
                        batch.append(job)
                self._waiting = [job for job in self._waiting if job not in batch]
                return batch
        return []

    def _members(self, anchor: PrefillJob) -> list[PrefillJob]:
        """The anchor, then the prompts of similar length, closest first."""
        others = [job for job in self._waiting if job is not anchor]
        others.sort(key=lambda job: abs(job.num_tokens - anchor.num_tokens))
        members = [anchor]
        for job in others:
            if not self._fits(members, job):
                break
            members.append(job)
        return members

    def _fits(self, batch: list[PrefillJob], job: PrefillJob) -> bool:
        lengths = [member.num_tokens for member in batch] + [job.num_tokens]
        similar = min(lengths) >= (1 - self._config.bucket_tolerance) * max(lengths)
        within = max(lengths) * len(lengths) <= self._config.token_budget
        return similar and within and len(lengths) <= self._config.max_batch

    def _is_full(self, batch: list[PrefillJob]) -> bool:
        longest = max(job.num_tokens for job in batch)
        budget = self._config.token_budget
        return longest * (len(batch) + 1) > budget or len(batch) == self._config.max_batch
