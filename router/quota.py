"""How many completions each tenant may have in the service at once."""

from __future__ import annotations

from collections import Counter

from tandem.errors import Overloaded


class TenantQuota:
    """Counts what waits and what runs, by tenant. A limit of 0 is none."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: Counter[str] = Counter()

    def check(self, tenant: str, count: int, retry_after_ms: int) -> None:
        """Raise `TENANT_QUOTA` if `count` more were too many."""
        if self._limit and self._running[tenant] + count > self._limit:
            raise Overloaded(
                "TENANT_QUOTA",
                f"your limit of {self._limit} concurrent requests is reached",
                retry_after_ms=retry_after_ms,
            )

    def begin(self, tenant: str, count: int) -> None:
        self._running[tenant] += count

    def end(self, tenant: str) -> None:
        """One has ended; a tenant without any is forgotten."""
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
