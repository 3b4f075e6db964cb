"""Gives every request a plan and a flight, and gives back what flights leave. The router's centre."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from router.admission import Admission, Plan
from router.answered import AnsweredNames
from router.flight import Flight
from router.links import StoreLink, WorkerLinks
from router.needs import Needs, needs_of
from router.placement import Placement
from router.queue import QueueSnapshot, RequestQueue
from router.quota import TenantQuota
from router.registry import WorkerRole
from router.replan import ReplanBudget
from router.routes import Traits
from router.size_bucket import Entry
from tandem.config import ClusterConfig
from tandem.errors import NotFound, TandemError, Unavailable
from tandem.geometry import ModelGeometry
from tandem.ledger import PoolAudit
from tandem.metrics import RouterMetrics
from tandem.request import STATUS_OF_REASON, Request, Timings, child_id, name_in_use, parent_id
from tandem.sampling import MAX_N

WORKER_WAIT_S = 30.0  # how long requests wait for a missing kind of worker to come (back)


def draining() -> Unavailable:
    """The service is about to end."""
    return Unavailable("DRAINING", "server is shutting down")


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


class Dispatcher:
    """Owned by the event loop. `pump` runs whenever memory or a worker may have become available."""

    def __init__(
        self,
        config: ClusterConfig,
        geometry: ModelGeometry,
        admission: Admission,
        links: WorkerLinks,
        store: StoreLink,
        metrics: RouterMetrics,
    ) -> None:
        self._config = config
        self._geometry = geometry
        draft = config.speculation.draft_path
        self._draft = ModelGeometry.from_path(draft) if draft else None
        self._held = config.kv_dtypes
        self._admission = admission
        self._store = store
        self._placement = Placement(config, admission, metrics)
        self._queue: RequestQueue[Ticket] = RequestQueue(
            config.router.max_queue,
            config.router.aging_s,
            can_ever_fit=lambda entry: admission.fits_when_idle(
                entry.request.needs, self._avoidable(entry.request.exclude)
            ),
        )
        self._flights: dict[str, Flight] = {}
        self._answered = AnsweredNames()
        self._quota = TenantQuota(config.router.max_requests_per_tenant)
        self._background: set[asyncio.Task[None]] = set()
        self._missing_since_s: float | None = None
        self._draining = False
        self._epochs = itertools.count(time.time_ns())  # grows across restarts too: it fences old writers
        self.links = links
        self.metrics = metrics
        self.replans = ReplanBudget()

    @property
    def num_flights(self) -> int:
        return len(self._flights)

    @property
    def is_draining(self) -> bool:
        return self._draining

    def queue_snapshot(self) -> QueueSnapshot:
        """The queue as an operator sees it."""
        return self._queue.snapshot()

    def check_ready(self) -> None:
        """Raise `Unavailable` unless there are workers of each kind, and time to serve."""
        if self._draining:
            raise draining()
        self._admission.check_available()

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

    def start(self, requests: Sequence[Request]) -> list[Flight]:
        """Begin all completions of one request, or none.

        Asked for again under the name of one that was answered lately, they get the seeds that one had.
        Raises `DRAINING`, `AlreadyExists`, `NEVER_FITS`, `TENANT_QUOTA`, or `Unavailable` if a kind of worker
        is missing for long. A full queue is reported by the flights.
        """
        with self.metrics.refusals():
            self._check_acceptable(requests)
            again = self._answered.again(requests)
            self._quota.check(requests[0].tenant, len(requests), self._queue.retry_after_ms())
        if again:
            requests = again
            self.metrics.note_repeated()
        flights = {request.request_id: Flight(self, request) for request in requests}
        self._flights.update(flights)
        self._quota.begin(requests[0].tenant, len(flights))
        return list(flights.values())

    def cancel(self, request_id: str, reason: TandemError) -> None:
        """End a running request with all its completions. Raises `NO_SUCH_REQUEST`."""
        flights = self._flights_of(request_id)
        if not flights:
            raise NotFound("NO_SUCH_REQUEST", "not found")
        for flight in flights:
            flight.cancel(reason)

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

    def pump(self) -> None:
        """Admit whatever fits now."""
        while self._queue.constrained_get(self._try_admit) is not None:
            pass

    def tick(self) -> None:
        """Housekeeping, a few times a second: nobody waits for ever for a worker that does not come."""
        try:
            self._check_workers()
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

    def forget_kv(self, request: Request, epoch: int) -> None:
        """Tell the store, in the background, that nobody will fetch what this attempt stores."""
        forget = self._store.forget(request.request_id, request.tenant, epoch)
        task = asyncio.get_running_loop().create_task(forget)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def landed(self, flight: Flight) -> None:
        if self._flights.pop(flight.request.request_id, None):
            self._quota.end(flight.request.tenant)
            if flight.request.lifecycle.status in STATUS_OF_REASON.values():
                self._answered.note(flight.request)

    def audit(self) -> list[PoolAudit]:
        """The router's credits; what no live request owns is an orphan."""
        return self._admission.audit(self._flights)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones finish for a while, then end the rest."""
        self._draining = True
        flights = list(self._flights.values())
        if flights:
            landings = [asyncio.ensure_future(flight.landed()) for flight in flights]
            await asyncio.wait(landings, timeout=timeout_s)
            for flight in flights:
                flight.cancel(draining())
            await asyncio.wait(landings)
        if self._background:
            await asyncio.wait(self._background)

    def _check_acceptable(self, requests: Sequence[Request]) -> None:
        if self._draining:
            raise draining()
        if running := self._flights_of(parent_id(requests[0].request_id)):
            raise name_in_use(running[0].request, requests[0])
        for request in requests:
            self._admission.check_fits_ever(self.needs(request))
        self._check_workers()

    def _flights_of(self, request_id: str) -> list[Flight]:
        """The running completions of the request that its caller knows by this name."""
        names = (request_id, *(child_id(request_id, index) for index in range(MAX_N)))
        return [self._flights[name] for name in names if name in self._flights]

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

    def _check_workers(self) -> None:
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
