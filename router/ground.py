"""What every flight is served by."""

from __future__ import annotations

from dataclasses import dataclass

from router.links import StoreLink, WorkerLinks
from router.planner import Planner
from tandem.metrics import RouterMetrics


@dataclass(frozen=True, slots=True)
class Ground:
    """One of each for all flights of a router."""

    planner: Planner
    links: WorkerLinks
    store: StoreLink
    metrics: RouterMetrics
