"""Whose turn it is: start-time fair queueing over tenants (Goyal, Vin and Cheng 1996).

Each tenant that waits has a virtual start time, and the earliest is next. Being served moves it on by what
was taken, so tenants that wait together get equal shares however much each asks for. Who comes anew starts at
the virtual time of whoever was served last: time in which a tenant asked for nothing is not saved up, and
what it took while nobody else waited costs it no more than one turn.
"""

from __future__ import annotations

from collections import Counter

SLACK = 64  # tenants that wait for nothing and are remembered without a sweep


class FairShares:
    """Owned by one thread."""

    def __init__(self) -> None:
        self._virtual = 0.0
        self._starts: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()

    def start(self, tenant: str) -> float:
        """Of a tenant that waits. It never gets less while the tenant waits."""
        return self._starts[tenant]

    def enter(self, tenant: str) -> None:
        """A request of the tenant waits."""
        if not self._waiting[tenant]:
            self._starts[tenant] = max(self._starts.get(tenant, 0.0), self._virtual)
        self._waiting[tenant] += 1

    def serve(self, tenant: str, cost: float) -> None:
        """One of its requests goes, and takes so much. `leave` follows."""
        start = self._starts[tenant]
        self._virtual = max(self._virtual, start)
        self._starts[tenant] = start + cost

    def leave(self, tenant: str) -> None:
        """A request of the tenant waits no more. When nobody waits, all is even."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
        if not self._waiting:
            self._starts.clear()
            self._virtual = 0.0
        elif len(self._starts) > 2 * len(self._waiting) + SLACK:
            self._starts = {
                name: start
                for name, start in self._starts.items()
                if name in self._waiting or start > self._virtual
            }
