"""How many requests may be in flight at once, as the service itself shows it."""

from __future__ import annotations

import asyncio


class Window:
    """One more after each window of successes, half after a refusal for load, never less than one.

    Additive increase, multiplicative decrease (Chiu and Jain, 1989). Several refusals that come together
    are one sign, so the window is halved once for those of the same generation.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._size = float(limit)
        self._generation = 0
        self._changed = asyncio.Event()

    @property
    def size(self) -> int:
        return int(self._size)

    async def enter(self) -> int:
        """Wait for a place; returns the generation to say with a refusal."""
        while self.in_flight >= self.size:
            self._changed.clear()
            await self._changed.wait()
        self.in_flight += 1
        return self._generation

    def leave(self) -> None:
        self.in_flight -= 1
        self._changed.set()

    def note_success(self) -> None:
        self._size = min(self._size + 1 / self._size, float(self.limit))
        self._changed.set()

    def note_refusal(self, generation: int) -> int:
        """Of a request sent in that generation; returns the one to send it again in."""
        if generation == self._generation:
            self._size = max(self._size / 2, 1.0)
            self._generation += 1
        return self._generation
