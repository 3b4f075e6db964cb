"""What steps bring, on its way from the step thread to the event loop, at a pace that the machine can afford.

Passing tokens on takes processor time that steps of a small model feel: a wake-up of the event loop in each
process on the way, and a message for each sequence. So tokens of several steps travel together where steps
are faster than that. A sequence's first token, its end and what goes wrong never wait, and take along
whatever waits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from decode_worker.accounting import by_router
from decode_worker.backlog import Backlog
from decode_worker.sequence import DecodeSequence, Event
from tandem.cores import usable_cores
from tandem.output import OutputDelta

MESSAGE_S, SEQUENCE_S = 1e-3, 0.45e-3  # processor time from here to the clients: of a message, of each in it
SHARE = 1 / 8  # of the cores, at most, for that
SHORTEST_S, LONGEST_S = 0.004, 0.02


def pace_s(num_sequences: int, num_cores: int) -> float:
    """How long after a message with tokens of so many sequences the next one leaves, unless it presses."""
    cost_s = MESSAGE_S + SEQUENCE_S * num_sequences
    return min(max(cost_s / (SHARE * num_cores), SHORTEST_S), LONGEST_S)


class Handover:
    """Make it on the event loop; the step thread puts, each router's `emit` is called on the loop.

    The loop wakes up once for a message: by a timer while messages follow each other, by the step thread
    otherwise.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._num_cores = len(usable_cores()) or 1
        self._lock = threading.Lock()
        self._backlog: Backlog[DecodeSequence] = Backlog()
        self._is_expected = False  # a delivery is under way or due
        self._timer: asyncio.TimerHandle | None = None  # event loop only

    def put(self, news: Sequence[tuple[DecodeSequence, Event]]) -> None:
        """The news of a step. Called by the step thread."""
        presses = False
        for sequence, event in news:
            presses |= sequence.is_silent or not isinstance(event, OutputDelta) or event.finish is not None
            sequence.is_silent = False
        with self._lock:
            self._backlog.put(news)
            presses |= bool(news) and not self._is_expected
            self._is_expected |= bool(news)
        if presses:
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """Pass on what waits; nothing waits any more after a pause."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            news = self._backlog.take()
            self._is_expected = bool(news)
        if news:
            self._timer = self._loop.call_later(pace_s(len(news), self._num_cores), self._deliver)
        for emit, told in by_router(news).items():
            emit(told)
