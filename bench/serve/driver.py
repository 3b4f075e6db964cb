"""Sends a workload by its schedule and notes what comes back. One event loop, nothing but sockets in it."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.serve.record import Outcome, RequestRecord
from bench.serve.target import Reply, SendError, Target
from bench.serve.workload import LoadRequest

TICK_S = 0.01  # of the clock that shows how late this process is


@dataclass(frozen=True, slots=True)
class Cancelling:
    """Some requests are cancelled by the client, as users leave."""

    share: float = 0.0
    after_s: float = 1.0


@dataclass(slots=True)
class Driver:
    """One run. `on_end` is called with each record that is complete."""

    target: Target
    cancelling: Cancelling = field(default_factory=Cancelling)
    seed: int = 0
    on_end: Callable[[RequestRecord], None] = lambda record: None
    loop_lags_ms: list[float] = field(default_factory=list)
    _began_s: float = 0.0

    async def run(
        self, requests: Sequence[LoadRequest], times_s: Sequence[float] | None, concurrency: int = 1
    ) -> list[RequestRecord]:
        """All requests at their times, or `concurrency` at once if there are none; in their order."""
        with _no_collections():
            self._began_s = time.perf_counter()
            ticking = asyncio.create_task(self._tick())
            try:
                if times_s is None:
                    return await self._closed(requests, concurrency)
                return await self._open(requests, times_s)
            finally:
                ticking.cancel()

    async def _open(self, requests: Sequence[LoadRequest], times_s: Sequence[float]) -> list[RequestRecord]:
        tasks = []
        for index, (request, at_s) in enumerate(zip(requests, times_s, strict=True)):
            if (left_s := at_s - self._now()) > 0:
                await asyncio.sleep(left_s)
            tasks.append(asyncio.create_task(self._one(index, request, at_s)))
        return list(await asyncio.gather(*tasks))

    async def _closed(self, requests: Sequence[LoadRequest], concurrency: int) -> list[RequestRecord]:
        """Each of `concurrency` users sends the next request when the last one ended."""
        left = iter(enumerate(requests))
        records: list[RequestRecord] = []

        async def user() -> None:
            for index, request in left:
                records.append(await self._one(index, request, self._now()))

        await asyncio.gather(*(user() for _ in range(concurrency)))
        return sorted(records, key=lambda record: record.index)

    async def _one(self, index: int, request: LoadRequest, scheduled_s: float) -> RequestRecord:
        reply, record = Reply(), RequestRecord(index, scheduled_s, self._now(), max_tokens=request.max_tokens)
        leaves = random.Random(f"{self.seed}/{index}").random() < self.cancelling.share
        try:
            async with asyncio.timeout(self.cancelling.after_s if leaves else None):
                await self.target.send(request, reply)
            record.outcome = Outcome.OK
        except TimeoutError:
            record.outcome = Outcome.CANCELLED
        except SendError as error:
            record.error = str(error)
        record.end_s = self._now()
        self._copy(reply, record)
        self.on_end(record)
        return record

    def _copy(self, reply: Reply, record: RequestRecord) -> None:
        record.arrivals = [(when - self._began_s, count) for when, count in reply.arrivals]
        record.prompt_tokens, record.output_tokens = reply.prompt_tokens, reply.output_tokens
        record.stages_ms = reply.stages_ms
        record.drafted, record.accepted = reply.drafted, reply.accepted
        record.digest = reply.text.hexdigest()[:16]

    async def _tick(self) -> None:
        """How late timers of this loop are is how late tokens are seen."""
        while True:
            due_s = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.loop_lags_ms.append(1e3 * (time.perf_counter() - due_s))

    def _now(self) -> float:
        return time.perf_counter() - self._began_s


@contextmanager
def _no_collections() -> Iterator[None]:
    """Python looks for garbage in all that was imported, for tens of milliseconds: not during a run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
