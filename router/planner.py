"""Gives every attempt of a request a pair of workers with room for it, and takes back what it held."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from router.admission import Admission, Plan
from router.needs import Needs, needs_of
from router.placement import Placement
from router.queue import QueueSnapshot, RequestQueue
from router.registry import WorkerRole
from router.replan import ReplanBudget
from router.routes import Traits
from router.size_bucket import Entry
from tandem.config import ClusterConfig
from tandem.errors import Unavailable
from tandem.geometry import ModelGeometry
from tandem.ledger import PoolAudit
from tandem.metrics import RouterMetrics
from tandem.request import Request, Timings

WORKER_WAIT_S = 30.0  # how long requests wait for a missing kind of worker to come (back)


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A request's place in the queue."""

    request_id: str
    tenant: str
    priority: int
    deadline_s: float
    epoch: int
    needs: Needs
    exclude: Collection[str]
    traits: Traits
    plan: asyncio.Future[Plan] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Planner:
    """Owned by the event loop. `pump` runs whenever memory or a worker may have become available."""

    def __init__(
        self, config: ClusterConfig, geometry: ModelGeometry, admission: Admission, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._geometry = geometry
        draft = config.speculation.draft_path
        self._draft = ModelGeometry.from_path(draft) if draft else None
        self._held = config.kv_dtypes
        self._admission = admission
        self._placement = Placement(config, admission, metrics)
        self._queue: RequestQueue[Ticket] = RequestQueue(
            config.router.max_queue,
            config.router.aging_s,
            can_ever_fit=lambda entry: admission.fits_when_idle(
                entry.request.needs, self._avoidable(entry.request.exclude)
            ),
        )
        self._missing_since_s: float | None = None
        self._epochs = itertools.count(time.time_ns())  # grows across restarts too: it fences old writers
        self.replans = ReplanBudget()

    def snapshot(self) -> QueueSnapshot:
        """The queue as an operator sees it."""
        return self._queue.snapshot()

    def retry_after_ms(self) -> int:
        """When a client that is refused now may come back."""
        return self._queue.retry_after_ms()

    def next_epoch(self) -> int:
        """A number for one attempt, higher than any before."""
        return next(self._epochs)

    def needs(self, request: Request) -> Needs:
        """What the request takes of each pool."""
        held = self._held
        return needs_of(
            request,
            self._geometry,
            self._config.cache.block_size,
            held.decode,
            draft=self._draft,
            stores_draft=self._config.speculation.draft_prefill == "prefill_worker",
            stored_dtype=held.wire,
        )

    def check_fits_ever(self, request: Request) -> None:
        """Raise `NEVER_FITS` for what no workers would have room for if they were idle."""
        self._admission.check_fits_ever(self.needs(request))

    def check_ready(self) -> None:
        """Raise `Unavailable` unless there are workers of each kind now."""
        self._admission.check_available()

    def check_workers(self) -> None:
        """Raise `Unavailable` if a kind of worker has been missing for long."""
        try:
            self._admission.check_available()
            self._missing_since_s = None
        except Unavailable as error:
            now_s = time.monotonic()
            self._missing_since_s = self._missing_since_s or now_s
            if now_s - self._missing_since_s > WORKER_WAIT_S:
                raise Unavailable(
                    error.reason, f"{error.message}; retry in 1000 ms", retry_after_ms=1000
                ) from error

    async def admit(self, request: Request, epoch: int, exclude: Collection[str]) -> Plan:
        """Wait in the queue until the request has all its credits. Raises `QUEUE_FULL`.

        A request that had a plan before returns to its old place, and a full queue takes it back. Its
        prompt has grown by what was delivered: `NEVER_FITS` if no prefill worker holds that.
        """
        since_s = request.lifecycle.received_s if len(request.lifecycle.stamps) > 1 else None
        needs = self.needs(request)
        self._admission.check_fits_ever(needs)
        named = request.request_id, request.tenant, request.priority, request.deadline_s
        ticket = Ticket(*named, epoch, needs, exclude, self._placement.traits(request))
        self._queue.put(ticket, needs.decode_blocks, since_s=since_s)
        self.pump()
        try:
            return await ticket.plan
        except asyncio.CancelledError:
            self._queue.remove(ticket.request_id)
            if ticket.plan.done() and not ticket.plan.cancelled() and not ticket.plan.exception():
                self.release(ticket.plan.result())
            raise

    def audit(self, live: Collection[str]) -> list[PoolAudit]:
        """The credits given out; what none of these requests owns is an orphan."""
        return self._admission.audit(live)

    def pump(self) -> None:
        """Admit whatever fits now."""
        while self._queue.constrained_get(self._try_admit) is not None:
            pass

    def tick(self) -> None:
        """Housekeeping, a few times a second: nobody waits for ever for a worker that does not come."""
        try:
            self.check_workers()
        except Unavailable as error:
            while entry := self._queue.constrained_get(lambda entry: True):
                if not entry.request.plan.done():
                    entry.request.plan.set_exception(
                        Unavailable(error.reason, error.message, retry_after_ms=error.retry_after_ms)
                    )
        self.pump()

    def release(self, plan: Plan) -> None:
        """Give back whatever the plan still holds."""
        self._placement.end(plan)
        self._admission.release_all(plan)
        self.pump()

    def computed(self, plan: Plan) -> None:
        """The decode worker has computed the prompt that stayed with it."""
        self._placement.computed(plan)

    def learn(self, plan: Plan, timings: Timings, num_restored: int) -> None:
        """An attempt has gone well, and this is what its stages took. So many tokens came from a store."""
        self._placement.learn(plan, timings, num_restored)

    def release_prefill(self, plan: Plan) -> None:
        self._admission.release_prefill(plan)
        self.pump()

    def release_store(self, plan: Plan) -> None:
        self._admission.release_store(plan)
        self.pump()

    def _try_admit(self, entry: Entry[Ticket]) -> bool:
        ticket = entry.request
        if ticket.plan.done():  # cancelled this very moment: out of the queue, without a plan
            return True
        exclude = self._avoidable(ticket.exclude)
        route = self._placement.route(ticket.traits)
        plan = self._admission.try_admit(ticket.request_id, ticket.epoch, ticket.needs, exclude, route)
        if plan is not None:
            ticket.plan.set_result(self._placement.place(plan, ticket.traits, ticket.exclude))
            self.replans.note_admitted()
        return plan is not None

    def _avoidable(self, exclude: Collection[str]) -> frozenset[str]:
        """The workers to avoid, as far as there are others of their kind now."""
        if not exclude:
            return frozenset()
        avoid = set(exclude)
        for role in WorkerRole:
            present = {candidate.worker_id for candidate in self._admission.candidates(role)}
            if present <= avoid:
                avoid -= present
        return frozenset(avoid)
