"""Ends what is due when no operation comes by to do it. A failed sweep is logged, and the next one runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from kvstore.store import KvStore

log = logging.getLogger(__name__)


class Sweeper:
    """Sweeps a store every `every_s` while the context is open. `age_s` growing past that is an alarm."""

    def __init__(self, store: KvStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._every_s = store.config.sweep_s
        self._clock = clock
        self._last_s = clock()
        self._watchdog: asyncio.Task[None] | None = None
        self.num_sweeps = self.num_failures = 0

    @property
    def age_s(self) -> float:
        """Seconds since the last sweep that went through."""
        return self._clock() - self._last_s

    async def __aenter__(self) -> Self:
        self._watchdog = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._watchdog is not None
        self._watchdog.cancel()
        await asyncio.wait({self._watchdog})

    async def _watch(self) -> None:
        """Start the sweep again whenever it ends, which it never should."""
        while True:
            try:
                await self._sweep()
            except Exception:
                self.num_failures += 1
                log.exception("the sweep failed and starts again; last good one %.1f s ago", self.age_s)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._store.turns.take(self._store.sweep)
            self._last_s = self._clock()
            self.num_sweeps += 1
