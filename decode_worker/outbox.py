"""What one router is told, in order, by a stream that may be slower than the steps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from decode_worker.sequence import Event
from tandem.output import OutputDelta

Key = tuple[str, int]  # request id and attempt
PACE_S = 0.004  # between messages of further tokens: those of a faster model would cost more than its steps


class Outbox:
    """Events on their way to a router. Used on the event loop.

    Tokens of a sequence that the stream has not taken yet become one event: a router that falls behind
    gets fewer and larger messages, and what waits for one that reads nothing is at most what its running
    sequences can still write. So do tokens that come within `PACE_S` of the last message, unless something
    that came with them presses.
    """

    def __init__(self) -> None:
        self._events: list[tuple[Key, Event]] = []
        self._latest: dict[Key, int] = {}  # where the last event of a sequence is
        self._is_closed = False
        self._news = asyncio.Event()
        self._pressing = asyncio.Event()
        self._taken_s = 0.0  # by the loop's clock

    def put(self, news: Iterable[tuple[Key, Event]], *, is_pressing: bool = True) -> None:
        """Behind everything else of the same sequence."""
        for key, event in news:
            index = self._latest.get(key)
            before = self._events[index][1] if index is not None else None
            if index is not None and isinstance(before, OutputDelta) and isinstance(event, OutputDelta):
                self._events[index] = key, before.followed_by(event)
            else:
                self._latest[key] = len(self._events)
                self._events.append((key, event))
        self._news.set()
        if is_pressing:
            self._pressing.set()

    def close(self) -> None:
        """Nothing more is taken."""
        self._is_closed = True
        self._news.set()
        self._pressing.set()

    async def take(self) -> list[tuple[Key, Event]] | None:
        """All that waits, at least one event; None once closed."""
        await self._news.wait()
        loop, due_s = asyncio.get_running_loop(), self._taken_s + PACE_S
        if not self._pressing.is_set() and loop.time() < due_s:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due_s):
                    await self._pressing.wait()
        if self._is_closed:
            return None
        self._taken_s = loop.time()
        self._news.clear()
        self._pressing.clear()
        events, self._events = self._events, []
        self._latest.clear()
        return events
