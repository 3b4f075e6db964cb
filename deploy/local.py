"""A whole service inside one process: for tests and notebooks. The same objects, the same sockets.

async with LocalCluster(config) as cluster:
    stub = GenerationServiceStub(cluster.channel)
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import grpc

from decode_worker.server import DecodeServer
from deploy.http import HttpFront
from deploy.store import EmbeddedStore
from prefill_worker.server import PrefillServer
from router.server import Router
from tandem.config import ClusterConfig
from tandem.errors import ConfigError
from tandem.ledger import PoolAudit
from tandem.rpc import channel

READY_S = 60.0


class LocalCluster:
    """Router, store and any number of workers on one event loop, with compute threads of their own."""

    def __init__(self, config: ClusterConfig, num_prefill: int = 1, num_decode: int = 1) -> None:
        if config.cores.claims:
            raise ConfigError("workers of one process cannot share cores: leave out cores.claims")
        self.config = config
        self._num_prefill = num_prefill
        self._num_decode = num_decode
        self.prefills: list[PrefillServer] = []
        self.decodes: list[DecodeServer] = []

    async def __aenter__(self) -> Self:
        self.store = EmbeddedStore(self.config)
        self.router = Router(self.config)
        self.http = HttpFront(self.config)
        await self.store.start()
        await self.router.start(
            add_services=[self.store.add_to], audits=self.store.audits, collectors=[self.store.metrics()]
        )
        await self.store.announce(self.router.internal_address)
        await self.http.start(self.router)
        self.address = f"{self.config.router.host}:{self.router.port}"
        self.http_address = f"{self.config.router.host}:{self.http.port}"
        self.channel: grpc.aio.Channel = channel(self.address)
        try:
            async with asyncio.timeout(READY_S):
                for index in range(self._num_prefill):
                    await self.add_prefill(f"prefill-{index}")
                for index in range(self._num_decode):
                    await self.add_decode(f"decode-{index}")
                await self.router.ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close()
        await self.router.stop(drain_s=0.0)
        await self.http.stop()
        await asyncio.gather(*(worker.stop() for worker in self._workers()))
        await self.router.close()
        await self.store.stop()

    async def add_prefill(self, worker_id: str) -> PrefillServer:
        worker = await PrefillServer.start(self.config, worker_id, self._router_address())
        self.prefills.append(worker)
        return worker

    async def add_decode(self, worker_id: str) -> DecodeServer:
        worker = await DecodeServer.start(self.config, worker_id, self._router_address())
        self.decodes.append(worker)
        return worker

    def _router_address(self) -> asyncio.Future[str]:
        """As a worker wants it; nothing is left over if it fails before it asks."""
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        address.set_result(self.router.internal_address)
        return address

    def audit(self) -> list[PoolAudit]:
        """The books of every pool in the cluster."""
        workers = [worker.worker.audit() for worker in self._workers()]
        return [*self.router.dispatcher.audit(), *self.store.audits(), *workers]

    def _workers(self) -> list[PrefillServer | DecodeServer]:
        return [*self.prefills, *self.decodes]
