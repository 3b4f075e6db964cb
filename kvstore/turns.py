"""Who runs a store's operations: the event loop itself, or one thread for a backend that waits.

Either way they run one at a time, in the order in which they were asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """One operation after another."""

    def __init__(self, *, in_thread: bool) -> None:
        self._thread = ThreadPoolExecutor(1, "kvstore") if in_thread else None

    async def take(self, operation: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the operation. Once begun it runs to its end, whatever happens to who waits."""
        if self._thread is None:
            return operation(*args, **kwargs)
        return await asyncio.wrap_future(self._thread.submit(operation, *args, **kwargs))

    async def take_or_undo(
        self, operation: Callable[P, T], undo: Callable[[T], object], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like `take`; if nobody waits for the result any more, it is undone."""
        if self._thread is None:
            return operation(*args, **kwargs)
        running = self._thread.submit(operation, *args, **kwargs)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:

            def end(done: Future[T]) -> None:
                if not done.cancelled() and done.exception() is None:
                    self.post(undo, done.result())

            running.add_done_callback(end)
            raise

    def post(self, operation: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run the operation after those before it; nobody waits for it. After `close` there is nothing left
        to do."""
        if self._thread is None:
            operation(*args, **kwargs)
        else:
            with suppress(RuntimeError):
                self._thread.submit(operation, *args, **kwargs)

    def close(self) -> None:
        """Wait for what was asked for."""
        if self._thread is not None:
            self._thread.shutdown()
