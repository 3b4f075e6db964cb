"""Begins a flight for every request that may begin, and keeps those under way. The router's centre."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from router.answered import AnsweredNames
from router.flight import Flight
from router.ground import Ground
from router.planner import Planner
from router.quota import TenantQuota
from tandem.errors import NotFound, TandemError, Unavailable
from tandem.ledger import PoolAudit
from tandem.metrics import RouterMetrics
from tandem.request import STATUS_OF_REASON, Request, child_id, name_in_use, parent_id
from tandem.sampling import MAX_N


def draining() -> Unavailable:
    """The service is about to end."""
    return Unavailable("DRAINING", "server is shutting down")


class Dispatcher:
    """Owned by the event loop."""

    def __init__(self, ground: Ground, max_per_tenant: int) -> None:
        self._ground = ground
        self._flights: dict[str, Flight] = {}
        self._answered = AnsweredNames()
        self._quota = TenantQuota(max_per_tenant)
        self._draining = False

    @property
    def planner(self) -> Planner:
        return self._ground.planner

    @property
    def metrics(self) -> RouterMetrics:
        return self._ground.metrics

    @property
    def num_flights(self) -> int:
        return len(self._flights)

    def check_ready(self) -> None:
        """Raise `Unavailable` unless there are workers of each kind, and time to serve."""
        if self._draining:
            raise draining()
        self.planner.check_ready()

    def start(self, requests: Sequence[Request]) -> list[Flight]:
        """Begin all completions of one request, or none.

        Asked for again under the name of one that was answered lately, they get the seeds that one had.
        Raises `DRAINING`, `AlreadyExists`, `NEVER_FITS`, `TENANT_QUOTA`, or `Unavailable` if a kind of worker
        is missing for long. A full queue is reported by the flights.
        """
        with self.metrics.refusals():
            self._check_acceptable(requests)
            again = self._answered.again(requests)
            self._quota.check(requests[0].tenant, len(requests), self.planner.retry_after_ms())
        if again:
            requests = again
            self.metrics.note_repeated()
        flights = {request.request_id: Flight(self._ground, request, self._landed) for request in requests}
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

    def audit(self) -> list[PoolAudit]:
        """The router's credits; what no live request owns is an orphan."""
        return self.planner.audit(self._flights)

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
        await self._ground.store.settle()

    def _check_acceptable(self, requests: Sequence[Request]) -> None:
        if self._draining:
            raise draining()
        if running := self._flights_of(parent_id(requests[0].request_id)):
            raise name_in_use(running[0].request, requests[0])
        for request in requests:
            self.planner.check_fits_ever(request)
        self.planner.check_workers()

    def _flights_of(self, request_id: str) -> list[Flight]:
        """The running completions of the request that its caller knows by this name."""
        names = (request_id, *(child_id(request_id, index) for index in range(MAX_N)))
        return [self._flights[name] for name in names if name in self._flights]

    def _landed(self, flight: Flight) -> None:
        if self._flights.pop(flight.request.request_id, None):
            self._quota.end(flight.request.tenant)
            if flight.request.lifecycle.status in STATUS_OF_REASON.values():
                self._answered.note(flight.request)
