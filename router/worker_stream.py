"""The one stream to a worker: orders out, news in, sorted by attempt. It does not know what they say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeVar

import grpc

from tandem.errors import TandemError

log = logging.getLogger(__name__)

MOST_BUNDLED_BYTES = 256 << 10  # but for the last order, which may be as large as any
Key = tuple[str, int]  # request id and attempt
News = TypeVar("News")


class Heard(NamedTuple, Generic[News]):
    """One event of a worker, as the router understands it."""

    news: News | TandemError | None  # None: nothing that this version knows
    is_last: bool


class _Listener(Generic[News]):
    """Who wants the news of one attempt. It is told from the reading task itself: at thousands of tokens a
    second, a queue and a task between the worker's stream and the client's would cost more than they do."""

    def __init__(self, on_news: Callable[[News], None]) -> None:
        self._on_news = on_news
        self.last: asyncio.Future[News] = asyncio.get_running_loop().create_future()
        self.is_over = False  # on the worker

    def hear(self, event: Any, read: Callable[[Any], Heard[News]]) -> None:
        """Pass it on; an error of the listener's own ends only this attempt."""
        if self.last.done():
            return
        try:
            news, is_last = read(event)
            if isinstance(news, TandemError):
                self.end(news)
            elif news is not None:
                self._on_news(news)
                if is_last:
                    self.is_over = True
                    self.last.set_result(news)
        except Exception as error:
            self.last.set_exception(error)

    def end(self, error: TandemError) -> None:
        """Nothing more will be heard."""
        self.is_over = True
        if not self.last.done():
            self.last.set_exception(error)
            self.last.exception()  # seen, even if the one who waits is cancelled this very moment


class WorkerStream(Generic[News]):
    """`read` tells what an event means. Once the stream is lost, whatever the reason, every attempt on it
    fails with what `lost` makes, and `on_broken` hears of it. With `takes_bundles` orders that were given
    while another was written leave in one message: sending one takes longer than all the rest of it."""

    def __init__(
        self,
        open_call: Callable[[], Any],
        read: Callable[[Any], Heard[News]],
        lost: Callable[[], TandemError],
        on_broken: Callable[[], None],
        *,
        takes_bundles: bool = False,
    ) -> None:
        self._takes_bundles = takes_bundles
        self._open_call = open_call
        self._read = read
        self._lost = lost
        self._on_broken = on_broken
        self._orders: asyncio.Queue[Any] = asyncio.Queue()
        self._listeners: dict[Key, _Listener[News]] = {}
        self.num_stale_events = 0  # news of attempts nobody waits for any more
        self._task = asyncio.get_running_loop().create_task(self._run())

    def send(self, order: Any) -> None:
        """Behind the orders before it; never answered in itself."""
        self._orders.put_nowait(order)

    async def follow(self, key: Key, start: Any, cancel: Any, on_news: Callable[[News], None]) -> News:
        """Send the order to start, tell `on_news` of everything about that attempt as it is read; returns the
        last of it. Unless the worker has ended it, the order to cancel is sent on the way out.

        Raises what the worker or `on_news` raised, or that the worker is lost.
        """
        if self._task.done():
            raise self._lost()
        listener = self._listeners[key] = _Listener(on_news)
        self.send(start)
        try:
            return await listener.last
        finally:
            del self._listeners[key]
            if not listener.is_over:
                self.send(cancel)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        call = self._open_call()
        sending = asyncio.get_running_loop().create_task(self._send(call))
        try:
            async for response in call:
                for event in response.events:
                    self._deliver(event)
        except grpc.aio.AioRpcError as error:
            log.warning("lost a worker (%s): %s", self._lost().reason, error.code().name)
        except Exception:
            log.exception("cannot read a worker's news")
        finally:
            call.cancel()
            sending.cancel()
            for listener in self._listeners.values():
                listener.end(self._lost())
        self._on_broken()

    async def _send(self, call: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reading side says why
            while True:
                await call.write(self._bundled(await self._orders.get()))

    def _bundled(self, first: Any) -> Any:
        """The order, with those behind it."""
        if not self._takes_bundles or self._orders.empty():
            return first
        orders, num_bytes = [first], first.ByteSize()
        while num_bytes < MOST_BUNDLED_BYTES and not self._orders.empty():
            orders.append(self._orders.get_nowait())
            num_bytes += orders[-1].ByteSize()
        return type(first)(orders=orders)

    def _deliver(self, event: Any) -> None:
        listener = self._listeners.get((event.request_id, event.epoch))
        if listener is None:
            self.num_stale_events += 1
        else:
            listener.hear(event, self._read)
