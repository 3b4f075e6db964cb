"""The KV store hosted inside another process's internal gRPC server."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence

import grpc

from deploy.store_metrics import StoreMetrics
from kvstore.announcer import Announcer
from kvstore.backends import shm
from kvstore.index import PrefixIndex
from kvstore.server import KvServicer, add_to_server
from kvstore.store import KvStore
from kvstore.sweeper import Sweeper
from kvstore.urls import backend_from_url
from kvstore.watchdog import TICK_S, Watchdog
from tandem.config import ClusterConfig
from tandem.ledger import PoolAudit

log = logging.getLogger(__name__)

EXIT_STUCK = os.EX_SOFTWARE


def leave_process() -> None:
    """End at once and say so: memory that no sweep frees is lost to everybody, and whoever supervises this
    process can start another."""
    log.critical("the KV store's sweep stands still: this process ends")
    os._exit(EXIT_STUCK)


def chosen_url(url: str, num_bytes: int) -> str:
    """`auto` is shared memory, which workers of this host read and write in place, if so many bytes are free
    there. In a container there may be little of it."""
    if url != "auto":
        return url
    return "shm://" if shm.has_room(num_bytes) else "memory://"


class EmbeddedStore:
    """A store with its sweeper. Start it inside a running event loop. A thread of its own calls `on_hang` if
    the sweep stands still."""

    def __init__(
        self, config: ClusterConfig, on_hang: Callable[[], None] | None = None, tick_s: float = TICK_S
    ) -> None:
        cache = config.cache
        backend = backend_from_url(chosen_url(config.kvstore.url, cache.store_bytes + cache.prefix_bytes))
        self._store = KvStore(backend, cache.store_bytes, config.kvstore, prefix_bytes=cache.prefix_bytes)
        self._sweeper = Sweeper(self._store)
        self._watchdog = on_hang and Watchdog(lambda: self._sweeper.num_sweeps, on_hang, tick_s)
        self._index_config = config.kvstore.index
        self._index: PrefixIndex | None = None
        self._announcer: Announcer | None = None

    async def start(self) -> None:
        """Raises `ConfigError` if the shared prefix index cannot be used."""
        if self._index_config.url:
            self._index = PrefixIndex(self._index_config)
            await self._index.check()
        await self._sweeper.__aenter__()
        if self._watchdog:
            self._watchdog.__enter__()

    async def announce(self, address: str) -> None:
        """Tell the shared index, if there is one, what is here. Workers find this store at `address`."""
        if self._index is not None:
            self._announcer = await Announcer(self._store, self._index, address).__aenter__()

    async def stop(self) -> None:
        if self._announcer:
            await self._announcer.__aexit__(None, None, None)
        elif self._index:
            await self._index.close()
        if self._watchdog:
            self._watchdog.__exit__(None, None, None)
        await self._sweeper.__aexit__(None, None, None)
        await asyncio.to_thread(self._store.close)

    def add_to(self, server: grpc.aio.Server) -> None:
        add_to_server(KvServicer(self._store), server)

    def metrics(self) -> StoreMetrics:
        """The store's counters for a scraper."""
        return StoreMetrics(self._store, self._sweeper, self._index)

    def audits(self) -> Sequence[PoolAudit]:
        return [self._store.audit()]
