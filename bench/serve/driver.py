"""Sends a workload by its schedule and notes what comes back. One event loop, nothing but sockets in it."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from bench.serve.record import Outcome, RequestRecord
from bench.serve.scrape import Scraper
from bench.serve.target import Reply, SendError, Target
from bench.serve.workload import LoadRequest

NOT_SENT = "NOT_SENT (an earlier turn did not end well)"
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
    scraper: Scraper | None = None
    loop_lags_ms: list[float] = field(default_factory=list)
    _began_s: float = 0.0
    _tasks: list[asyncio.Task[list[RequestRecord]]] = field(default_factory=list)
    _is_stopped: bool = False

    async def run(
        self, requests: Sequence[LoadRequest], times_s: Sequence[float] | None, concurrency: int = 1
    ) -> list[RequestRecord]:
        """All requests at their times, or `concurrency` at once if there are none; in their order."""
        with _no_collections():
            self._began_s = time.perf_counter()
            beside = [asyncio.create_task(self._tick())]
            if self.scraper is not None:
                beside.append(asyncio.create_task(self.scraper.follow(self._now)))
            try:
                if times_s is None:
                    return await self._closed(requests, concurrency)
                return await self._open(requests, times_s)
            finally:
                for task in beside:
                    task.cancel()

    async def _open(self, requests: Sequence[LoadRequest], times_s: Sequence[float]) -> list[RequestRecord]:
        for index, request, at_s in zip(_first_indices(requests), requests, times_s, strict=True):
            if (left_s := at_s - self._now()) > 0:
                await asyncio.sleep(left_s)
            if self._is_stopped:
                break
            self._tasks.append(asyncio.create_task(self._turns(index, request, at_s)))
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        ended = (task for task in self._tasks if task.done() and not task.cancelled())
        return [record for task in ended for record in task.result()]

    def stop(self) -> None:
        """End an open-loop run now: nothing more is sent, and what runs is cancelled and not recorded."""
        self._is_stopped = True
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _closed(self, requests: Sequence[LoadRequest], concurrency: int) -> list[RequestRecord]:
        """Each of `concurrency` users sends the next request when the last one and its turns ended."""
        left = zip(_first_indices(requests), requests, strict=True)
        records: list[RequestRecord] = []

        async def user() -> None:
            for index, request in left:
                records.extend(await self._turns(index, request, self._now()))

        await asyncio.gather(*(user() for _ in range(concurrency)))
        return sorted(records, key=lambda record: record.index)

    async def _turns(self, index: int, request: LoadRequest, scheduled_s: float) -> list[RequestRecord]:
        """A request and, in a conversation, all after it, each with all before it as its context.

        A turn is due when its user has thought since the end of the last. If one fails, so do the rest.
        """
        records = [await self._one(index, request, scheduled_s, reply := Reply())]
        while request.then is not None and not self._is_stopped:
            request, last = _in_context(request, request.then, reply), records[-1]
            reply, due_s = Reply(), last.end_s + request.think_s
            if last.outcome is Outcome.OK:
                await asyncio.sleep(max(due_s - self._now(), 0))
                record = await self._one(index + len(records), request, due_s, reply)
            else:
                record = self._record(index + len(records), request, last.end_s)
                record.end_s, record.error = record.sent_s, NOT_SENT
                self.on_end(record)
            record.turn = len(records)
            records.append(record)
        return records

    def _record(self, index: int, request: LoadRequest, scheduled_s: float) -> RequestRecord:
        record = RequestRecord(index, scheduled_s, self._now(), max_tokens=request.max_tokens)
        record.request_class, record.session = request.request_class, request.session
        return record

    async def _one(self, index: int, request: LoadRequest, scheduled_s: float, reply: Reply) -> RequestRecord:
        record = self._record(index, request, scheduled_s)
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
        record.cached_tokens = reply.cached_tokens
        record.digest = reply.text.hexdigest()[:16]

    async def _tick(self) -> None:
        """How late timers of this loop are is how late tokens are seen."""
        while True:
            due_s = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.loop_lags_ms.append(1e3 * (time.perf_counter() - due_s))

    def _now(self) -> float:
        return time.perf_counter() - self._began_s


def _first_indices(requests: Sequence[LoadRequest]) -> Iterator[int]:
    """Of each request's first record: turns follow it."""
    total = 0
    for request in requests:
        yield total
        total += request.num_turns


def _in_context(before: LoadRequest, turn: LoadRequest, reply: Reply) -> LoadRequest:
    """The turn with its prompt behind all that was said, as text or as token ids."""
    if isinstance(before.prompt, str):
        assert isinstance(turn.prompt, str)
        return replace(turn, prompt=before.prompt + "".join(reply.texts) + turn.prompt)
    assert not isinstance(turn.prompt, str)
    return replace(turn, prompt=[*before.prompt, *reply.token_ids, *turn.prompt])


@contextmanager
def _no_collections() -> Iterator[None]:
    """Python looks for garbage in all that was imported, for tens of milliseconds: not during a run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
