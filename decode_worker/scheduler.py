"""Which sequences run in the next step: continuous batching with joins and leaves at every step. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from decode_worker.sequence import DecodeSequence


class DecodeScheduler:
    """Sequences whose KV is in place. At most `max_batch` run; later arrivals wait their turn."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._ready: deque[DecodeSequence] = deque()
        self._running: list[DecodeSequence] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._ready)

    def join(self, sequence: DecodeSequence) -> None:
        self._ready.append(sequence)

    def schedule(self) -> list[DecodeSequence]:
        """The batch of the next step, oldest first."""
        while self._ready and len(self._running) < self._max_batch:
            self._running.append(self._ready.popleft())
        return list(self._running)

    def leave(self, is_gone: Callable[[DecodeSequence], bool]) -> list[DecodeSequence]:
        """Take out the sequences that ended or that nobody waits for."""
        gone = [sequence for sequence in (*self._running, *self._ready) if is_gone(sequence)]
        if gone:
            self._running = [sequence for sequence in self._running if sequence not in gone]
            self._ready = deque(sequence for sequence in self._ready if sequence not in gone)
        return gone
