"""What one router is told, in order, by a stream that may be slower than what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from decode_worker.backlog import Backlog
from decode_worker.sequence import Event

Key = tuple[str, int]  # request id and attempt


class Outbox:
    """Events on their way to a router. Used on the event loop.

    Tokens of a sequence that the stream has not taken yet become one event: a router that falls behind
    gets fewer and larger messages, and what waits for one that reads nothing is at most what its running
    sequences can still write.
    """

    def __init__(self) -> None:
        self._backlog: Backlog[Key] = Backlog()
        self._is_closed = False
        self._news = asyncio.Event()

    def put(self, news: Iterable[tuple[Key, Event]]) -> None:
        """Behind everything else of the same sequence."""
        self._backlog.put(news)
        self._news.set()

    def close(self) -> None:
        """Nothing more is taken."""
        self._is_closed = True
        self._news.set()

    async def take(self) -> list[tuple[Key, Event]] | None:
        """All that waits, at least one event; None once closed."""
        await self._news.wait()
        if self._is_closed:
            return None
        self._news.clear()
        return self._backlog.take()
