"""Calls to Redis from an event loop, again and again while it does not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tandem.errors import Unavailable

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0

P = ParamSpec("P")
T = TypeVar("T")


class Patience:
    """Whoever calls has made sure that a call whose reply was lost can be made again."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.num_failures = 0
        self.is_failing = False  # the last call of all

    async def call(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In a thread. Raises `Unavailable` when Redis has been silent for too long."""
        import redis

        full = (redis.ReadOnlyError, redis.OutOfMemoryError)
        away = (redis.ConnectionError, redis.TimeoutError, OSError, *full)
        since_s, backoff_s = time.monotonic(), FIRST_BACKOFF_S
        while True:
            try:
                answer = await asyncio.to_thread(method, *args, **kwargs)
                self.is_failing = False
                return answer
            except away as error:
                self.num_failures += 1
                self.is_failing = True
                silent_s = time.monotonic() - since_s
                if silent_s > self._patience_s:
                    why = f"Redis has not answered for {silent_s:.0f} s ({type(error).__name__})"
                    raise Unavailable("STORE_DOWN", f"{why}; the queue can be resumed") from error
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
