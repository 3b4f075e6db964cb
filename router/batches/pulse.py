"""Something that happens again and again, and those who wait for the next time."""

from __future__ import annotations

import asyncio


class Pulse:
    """Ask for `next` before looking at what may have changed: then no beat is missed."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def next(self) -> asyncio.Event:
        """Set at the next beat."""
        return self._next

    def beat(self) -> None:
        happened, self._next = self._next, asyncio.Event()
        happened.set()
