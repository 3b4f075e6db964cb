"""The KV store hosted inside another process's internal gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from deploy.store_metrics import StoreMetrics
from kvstore.backend import backend_from_url
from kvstore.server import KvServicer, add_to_server
from kvstore.store import KvStore
from kvstore.sweeper import Sweeper
from tandem.config import ClusterConfig
from tandem.ledger import PoolAudit


class EmbeddedStore:
    """A store with its sweeper. Start it inside a running event loop."""

    def __init__(self, config: ClusterConfig) -> None:
        backend = backend_from_url(config.kvstore.url)
        self._store = KvStore(
            backend, config.cache.store_bytes, config.kvstore, prefix_bytes=config.cache.prefix_bytes
        )
        self._sweeper = Sweeper(self._store)

    async def start(self) -> None:
        await self._sweeper.__aenter__()

    async def stop(self) -> None:
        await self._sweeper.__aexit__(None, None, None)
        await asyncio.to_thread(self._store.close)

    def add_to(self, server: grpc.aio.Server) -> None:
        add_to_server(KvServicer(self._store), server)

    def metrics(self) -> StoreMetrics:
        """The store's counters for a scraper."""
        return StoreMetrics(self._store)

    def audits(self) -> Sequence[PoolAudit]:
        return [self._store.audit()]
