"""What /metrics says of the KV store in this process, read when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.index import PrefixIndex
from kvstore.store import KvStore
from kvstore.sweeper import Sweeper


class StoreMetrics(Collector):
    """The store's own counters, and how long ago it was swept."""

    def __init__(self, store: KvStore, sweeper: Sweeper, index: PrefixIndex | None) -> None:
        self._store = store
        self._sweeper = sweeper
        self._index = index

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: the names do not depend on a first scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        counters = self._store.counters
        operations = CounterMetricFamily(
            "tandem_kv_operations", "What the KV store did, or refused to do.", labels=("op",)
        )
        for name, count in asdict(counters).items():
            operations.add_metric((name,), count)
        yield operations
        expired = "Stored objects and leases whose time ran out before they were given up."
        yield CounterMetricFamily("tandem_lease_expired", expired, value=counters.expired)
        age = "Seconds since what was due was last ended; more than a few are an alarm."
        yield GaugeMetricFamily("tandem_kv_sweep_age_s", age, value=self._sweeper.age_s)
        failures = "Chunks that failed their digest when they were put into the store."
        yield CounterMetricFamily("tandem_kv_verify_failures", failures, value=counters.refused_corrupt)
        if self._index is not None:
            up = "Whether the shared prefix index answers; 0: other stores' prefixes are not found."
            yield GaugeMetricFamily("tandem_prefix_index_up", up, value=float(self._index.is_up))
            announced = "Prefixes that this store told the shared index of, again after it had lost them too."
            yield CounterMetricFamily(
                "tandem_prefix_index_announced", announced, value=self._index.report.num_announced
            )
