"""How much of a budget one tenant may hold, and how much one writer may have reserved and not written.

A writer is a connection. One that reserves and never writes, by mistake or on purpose, keeps no more from
the others than its share until its put deadlines end.
"""

from __future__ import annotations

from collections import Counter

from kvstore.objects import KvObject
from kvstore.records import ObjectHeader
from tandem.config import KvStoreConfig
from tandem.errors import Overloaded


class Shares:
    """Bytes by tenant, and reserved bytes by writer, for each of the two budgets."""

    def __init__(self, total_bytes: int, prefix_bytes: int, config: KvStoreConfig) -> None:
        self._totals = (total_bytes, prefix_bytes)
        self._config = config
        self._held: Counter[tuple[int, str]] = Counter()  # by budget and tenant
        self._reserved: Counter[tuple[int, str]] = Counter()  # by budget and writer

    def check(self, header: ObjectHeader, writer: str) -> None:
        """TENANT_QUOTA or NO_MEMORY_FIT_NOW if the object would be more than a share. Tenants' prefixes are
        not counted: they make room for each other."""
        budget, config = header.is_prefix, self._config
        tenant_bytes, writer_bytes = self._held[budget, header.tenant], self._reserved[budget, writer]
        if not header.is_prefix:
            self._check(config.tenant_share, header, tenant_bytes, "TENANT_QUOTA", "one tenant may keep")
        self._check(config.writer_share, header, writer_bytes, "NO_MEMORY_FIT_NOW", "one writer may reserve")

    def _check(self, share: float, header: ObjectHeader, num_bytes: int, reason: str, who_may: str) -> None:
        most = int(share * self._totals[header.is_prefix])
        if share < 1 and num_bytes + header.total_bytes > most:
            wait_ms = max(1, int(1000 * self._config.sweep_s))
            raise Overloaded(reason, f"{who_may} {most} bytes of the store", retry_after_ms=wait_ms)

    def reserved(self, obj: KvObject) -> None:
        budget, num_bytes = obj.header.is_prefix, obj.header.total_bytes
        self._held[budget, obj.header.tenant] += num_bytes
        self._reserved[budget, obj.writer] += num_bytes

    def written(self, obj: KvObject) -> None:
        """The object is sealed, or will never be."""
        _take(self._reserved, (obj.header.is_prefix, obj.writer), obj.header.total_bytes)

    def freed(self, obj: KvObject) -> None:
        _take(self._held, (obj.header.is_prefix, obj.header.tenant), obj.header.total_bytes)

    def check_integrity(self, objects: list[KvObject]) -> None:
        """Held and reserved are exactly what these objects are."""
        mine = Shares(*self._totals, self._config)
        for obj in objects:
            mine.reserved(obj)
            if obj.seal is not None:
                mine.written(obj)
        assert (mine._held, mine._reserved) == (self._held, self._reserved), (self._held, self._reserved)


def _take(counts: Counter[tuple[int, str]], name: tuple[int, str], num_bytes: int) -> None:
    """Names that hold nothing are forgotten: tenants and connections come and go."""
    counts[name] -= num_bytes
    if not counts[name]:
        del counts[name]
