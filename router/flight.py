"""One request under way: the stages, the re-plans, the time line, the end.

The life of a request here:
 1. QUEUED    a ticket waits in the queue until the admission has credits on a pair and the store.
 2. PREFILL   the prompt goes to the prefill worker; its first token comes back and is passed on at once.
 3. TRANSFER  the handle of the KV comes back and goes to the decode worker, which fetches it.
 4. DECODE    tokens arrive step by step until one of them is the last.
 5. FINISHED  credits, links and stored KV are given back on every path; exactly one end is reported.
A stage whose worker is lost or refuses is planned again, once, with the tokens already delivered as
part of the prompt: the random numbers depend on (seed, position), so the text goes on as it would have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from router.admission import Plan
from router.endings import STAGES, as_client_sees, status_of
from router.flight_events import Admitted, Completed, FlightEvent
from router.ground import Ground
from router.links import DecodeLink
from router.prefill_link import PrefillNews, no_prefill
from router.registry import WorkerInfo
from tandem.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    Overloaded,
    TandemError,
    Unavailable,
)
from tandem.output import OutputDelta
from tandem.pb.kv.v1 import kv_pb2
from tandem.pb.worker.v1 import worker_pb2
from tandem.prefix_usage import NO_HIT
from tandem.request import STATUS_OF_REASON, Mark, Request, RequestStatus, Usage
from tandem.work import HOP_MARGIN_S, Work

log = logging.getLogger(__name__)

# A worker's deadline that passed before ours is a transfer that stood still.
WORTH_ANOTHER_PLAN = (Unavailable, Overloaded, FailedPrecondition, NotFound, DataLoss, DeadlineExceeded)
MIN_TIME_LEFT_S = 2 * HOP_MARGIN_S  # less is the deadline itself, as a worker sees it
MAX_BACKLOG = 4096  # deltas a client may leave unread before it is given up


class Flight:
    """Runs one request in a task of its own. Iterate over it for what happens."""

    def __init__(self, ground: Ground, request: Request, on_landed: Callable[[Flight], None]) -> None:
        self._planner, self._links = ground.planner, ground.links
        self._store, self._metrics = ground.store, ground.metrics
        self._on_landed = on_landed  # called once, when everything has been given back
        self.request = request
        self._epoch = 0
        self._num_given = self._delivered = request.num_output_tokens
        self._delivered_s = request.lifecycle.received_s  # when, last
        self._num_admitted = 0
        self._drafted, self._accepted, self._hit = 0, 0, NO_HIT
        self._prefetching: DecodeLink | None = None  # fetches the KV for a decode that has yet to begin
        self._is_storing = False  # the attempt's KV is on its way to the store or there, not yet fetched
        self._ordered: Work | None = None  # of workers, last
        self._new_ids: list[int] = []  # delivered, and not yet part of `request`
        self._replanned: set[str] = set()
        self._exclude: set[str] = set()
        self._reason: TandemError | None = None  # why it was cancelled
        self._events: asyncio.Queue[FlightEvent | TandemError] = asyncio.Queue()
        self._held: FlightEvent | TandemError | None = None  # to be told next
        self._is_told = False  # to its end
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._end)

    def __aiter__(self) -> Flight:
        return self

    async def __anext__(self) -> FlightEvent:
        """Admitted (again after a re-plan), deltas, Completed; or the one error that ended it.

        Deltas that have piled up are merged. Who stops before the end calls `leave`.
        """
        if self._is_told:
            raise StopAsyncIteration
        event, self._held = self._held or await self._events.get(), None
        while isinstance(event, OutputDelta) and not self._events.empty():
            following = self._events.get_nowait()
            if not isinstance(following, OutputDelta):
                self._held = following
                break
            event = event.followed_by(following)
        self._is_told = isinstance(event, (Completed, TandemError))
        if isinstance(event, TandemError):
            raise event
        return event

    def leave(self) -> None:
        """Whoever followed it does so no more; that is the end of a request that has not ended."""
        if not self._task.done():
            self.cancel(Cancelled())

    def cancel(self, reason: TandemError) -> None:
        """End the request; its stream ends with `reason`. Too late is harmless."""
        if not self._task.done():
            self._reason = self._reason or reason
            self._task.cancel()

    async def landed(self) -> None:
        """Until everything the request held has been given back."""
        await asyncio.wait({self._task})

    def _end(self, task: asyncio.Task[None]) -> None:
        """The task is over. One that was cancelled before its first step has said nothing yet."""
        if not self.request.lifecycle.status.is_finished:
            self._fail(self._reason or Cancelled(), RequestStatus.FINISHED_CANCELLED)
        self._on_landed(self)

    async def _run(self) -> None:
        lifecycle = self.request.lifecycle
        try:
            async with asyncio.timeout_at(self.request.deadline_s):
                last = await self._fly()
            lifecycle.mark(Mark.FINISHED)
            assert last.finish is not None
            lifecycle.to(STATUS_OF_REASON[last.finish])
            counts = self._delivered, self._hit, self._drafted, self._accepted
            usage = Usage(self.request.num_prompt_tokens, *counts, last.speculation)
            completed = Completed(last, usage, lifecycle.timings())
            self._metrics.note_finished(last.finish.value, usage, completed.timings)
            self._events.put_nowait(completed)
        except TimeoutError:
            self._fail(DeadlineExceeded(STAGES[lifecycle.status]), RequestStatus.FINISHED_DEADLINE)
        except asyncio.CancelledError:
            self._fail(self._reason or Cancelled(), RequestStatus.FINISHED_CANCELLED)
        except TandemError as error:
            self._fail(error, status_of(error))
        except Exception:
            bug = Internal.bug()
            log.exception("request %s failed (%s)", self.request.request_id, bug.error_id)
            self._fail(bug, RequestStatus.FINISHED_ERROR)

    def _fail(self, error: TandemError, status: RequestStatus) -> None:
        seen = as_client_sees(error, STAGES[self.request.lifecycle.status], self._delivered)
        self.request.lifecycle.mark(Mark.FINISHED)
        self.request.lifecycle.to(status)
        if not self._num_admitted:
            self._metrics.note_refused(seen)
        self._metrics.note_failed(seen)
        self._events.put_nowait(seen)

    async def _fly(self) -> OutputDelta:
        """Attempts until one succeeds; returns the last delta."""
        while True:
            self._epoch = self._planner.next_epoch()
            self._fold()
            plan = await self._planner.admit(self.request, self._epoch, self._exclude)
            self._metrics.note_admitted(again=self._num_admitted > 0)
            self._num_admitted += 1
            self._events.put_nowait(Admitted(plan))
            try:
                last = await self._attempt(plan)
                if self._num_admitted == 1:
                    self._planner.learn(plan, self.request.lifecycle.timings(), self._hit.num_tokens)
                return last
            except WORTH_ANOTHER_PLAN as error:
                self._replan_or_raise(plan, error)
            finally:
                self._planner.release(plan)

    async def _attempt(self, plan: Plan) -> OutputDelta:
        self.request.lifecycle.mark(Mark.ADMITTED)
        self.request.lifecycle.to(RequestStatus.PREFILL)
        self.request.lifecycle.placement = plan.decision.name
        if plan.decision.is_local:
            return await self._decode(plan, None)
        try:
            first, handle = await self._prefill(plan)
            return first if handle is None else await self._decode(plan, handle)
        finally:
            if self._prefetching is not None:
                self._prefetching.cancel(self._work(plan.decode))
                self._prefetching = None
            if self._is_storing:
                self._store.forget(self.request, self._epoch)
                self._is_storing = False

    async def _prefill(self, plan: Plan) -> tuple[OutputDelta, kv_pb2.KvHandle | None]:
        """The first token, delivered; and unless it was the last, where the KV is."""
        lifecycle = self.request.lifecycle
        first: OutputDelta | None = None
        handle: kv_pb2.KvHandle | None = None

        def take(news: PrefillNews) -> None:
            nonlocal first, handle
            if isinstance(news, worker_pb2.KvOpened):
                self._prefetch(plan, news.handle)
            elif isinstance(news, worker_pb2.KvSealed):
                handle = news.handle
                lifecycle.mark(Mark.KV_SEALED)
                lifecycle.note_transfer(news.send_ns)
                self._planner.release_prefill(plan)
            else:
                first = news
                lifecycle.mark(Mark.FIRST_TOKEN)
                self._deliver(news)

        self._is_storing = True
        await self._links.prefill(plan.prefill).prefill(self._work(plan.decode), take)
        if first is None or (first.finish is None) == (handle is None):
            raise no_prefill()
        self._is_storing = handle is not None
        return first, handle

    def _prefetch(self, plan: Plan, handle: kv_pb2.KvHandle) -> None:
        """The decode worker may take what of the KV is there; a lost one is noticed when it is to decode."""
        with suppress(Unavailable):
            link = self._links.decode(plan.decode)
            link.prefetch(self._work(plan.decode), handle)
            self._prefetching = link

    async def _decode(self, plan: Plan, handle: kv_pb2.KvHandle | None) -> OutputDelta:
        """Tokens until the last one, each delivered as it comes; without a handle the first one too."""
        lifecycle = self.request.lifecycle
        if handle is not None:
            lifecycle.to(RequestStatus.TRANSFER)
        work = self._work(plan.decode)
        to_mark = [Mark.SECOND_TOKEN] if handle else [Mark.SECOND_TOKEN, Mark.FIRST_TOKEN]

        def take(event: worker_pb2.DecodeStarted | OutputDelta) -> None:
            if isinstance(event, worker_pb2.DecodeStarted):
                self._note_started(plan, event)
                return
            if to_mark:
                lifecycle.mark(to_mark.pop())
                self._planner.computed(plan)
                if lifecycle.status is RequestStatus.PREFILL:
                    lifecycle.to(RequestStatus.DECODE)
            self._deliver(event)

        link, self._prefetching = self._links.decode(plan.decode), None
        return await link.decode(work, handle, take)

    def _note_started(self, plan: Plan, started: worker_pb2.DecodeStarted) -> None:
        lifecycle = self.request.lifecycle
        lifecycle.mark(Mark.KV_READ_STARTED, asyncio.get_running_loop().time() - started.kv_read_ns / 1e9)
        lifecycle.mark(Mark.KV_READ_DONE)
        lifecycle.note_transfer(started.prefetch_ns + started.kv_read_ns)
        lifecycle.to(RequestStatus.DECODE)
        self._is_storing = False  # the decode worker has read it, and gives it up
        self._planner.release_store(plan)

    def _deliver(self, delta: OutputDelta) -> None:
        """Pass tokens on, and remember them: another worker may have to go on from here."""
        if self._events.qsize() > MAX_BACKLOG:
            raise Overloaded("CLIENT_TOO_SLOW", "client too slow: too many tokens were left unread")
        now_s, is_first = time.monotonic(), self._delivered == self._num_given
        self._metrics.note_tokens(len(delta.token_ids), now_s - self._delivered_s, first=is_first)
        self._delivered, self._delivered_s = self._delivered + len(delta.token_ids), now_s
        self._drafted += delta.drafted
        self._hit = max(self._hit, delta.cached)
        self._accepted += delta.accepted
        self._new_ids.extend(delta.token_ids)
        self._events.put_nowait(delta)

    def _fold(self) -> None:
        """Make what was delivered part of the request: another attempt goes on behind it."""
        if not self._new_ids:
            return
        self.request = replace(self.request, token_ids=(*self.request.token_ids, *self._new_ids))
        self._new_ids = []

    def _work(self, worker: WorkerInfo) -> Work:
        """What is left to do, from where the client stands."""
        self._fold()
        if self._ordered is None or self._ordered.epoch != self._epoch:
            router_id = self._links.router_id
            self._ordered = Work.of(self.request, self._epoch, worker.fingerprint, router_id)
        elif self._ordered.token_ids is not self.request.token_ids:
            self._ordered = replace(self._ordered, token_ids=self.request.token_ids)
        return self._ordered

    def _replan_or_raise(self, plan: Plan, error: TandemError) -> None:
        """Send the request back to the queue, or end it: one more plan per stage, within the budget."""
        stage = STAGES[self.request.lifecycle.status]
        is_too_late = self.request.deadline_s - time.monotonic() < MIN_TIME_LEFT_S
        is_final = is_too_late or error.reason == "CLIENT_TOO_SLOW"
        if is_final or stage in self._replanned or not self._planner.replans.take():
            raise error
        log.info("planning %s again: %s in %s", self.request.request_id, error.reason, stage)
        self._replanned.add(stage)
        self._exclude |= plan.blamed(stage, error)
        self.request.lifecycle.to(RequestStatus.QUEUED)
