"""Puts a prefill worker together and serves it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import grpc

from kvstore.client import KvClient
from prefill_worker.handoff import HandoffContext
from prefill_worker.service import PrefillServicer
from prefill_worker.worker import PrefillWorker
from tandem.config import ClusterConfig
from tandem.draft_checkpoint import usable_draft
from tandem.engine.cores import cores_of
from tandem.engine.loading import Engine, load_engine
from tandem.engine.profiler import Profiler, profiler_of
from tandem.fingerprint import model_fingerprint
from tandem.internal import InternalPlane
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.registration import WorkerLoad
from tandem.tokenizer import Tokenizer
from tandem.worker_host import WorkerHost


class PrefillServer:
    """One prefill worker with its model, its pool and its gRPC server."""

    def __init__(
        self,
        host: WorkerHost,
        worker: PrefillWorker,
        store: grpc.aio.Channel,
        kernels: str,
        profiler: Profiler | None = None,
    ) -> None:
        self._host = host
        self._store = store
        self.worker = worker
        self.kernels = kernels  # what runs the model, for operators
        self._profiler = profiler

    @classmethod
    async def start(cls, config: ClusterConfig, worker_id: str, router: Awaitable[str]) -> PrefillServer:
        """Load the model, serve, register. The router, which hosts the store too, may become known while
        the model loads."""
        engine = await asyncio.to_thread(_engine, config, worker_id)
        fingerprint = model_fingerprint(config)
        router_address = await router
        plane = InternalPlane.of(config)
        store_channel = plane.channel(router_address)
        client = KvClient(store_channel, config.kvstore)
        context = HandoffContext.of(config, engine, client, fingerprint)
        cores = cores_of(config.cores, config.prefill.threads)
        worker = PrefillWorker(
            config.prefill,
            engine.model.called("prefill"),
            engine.pool,
            Tokenizer.from_dir(config.model.path),
            context,
            engine.draft,
            cores,
        )
        host = WorkerHost(router_address, plane)
        servicer = PrefillServicer(worker, fingerprint)
        info = engine.worker_info(worker_id, pb.WORKER_ROLE_PREFILL, fingerprint, cores.name)
        info.streams_prefill = True
        await host.start(
            info,
            lambda server: worker_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server),
            lambda: WorkerLoad(
                engine.pool.num_free,
                worker.num_running,
                worker.num_waiting,
                num_cores=cores.num_cores,
                prefixes=context.prefixes.report if context.prefixes else None,
            ),
            worker.audit,
        )
        return cls(host, worker, store_channel, engine.describe(), profiler_of(config, worker_id, engine))

    @property
    def address(self) -> str:
        """Where it serves gRPC, host:port."""
        return self._host.address

    async def drain(self, within_s: float) -> bool:
        """Take no new work; whether all that ran has ended in that time."""
        return await self._host.drain(within_s)

    async def stop(self) -> None:
        """Leave the router, end what runs, close."""
        await self._host.stop()
        await self.worker.stop()
        if self._profiler is not None:
            await asyncio.to_thread(self._profiler.close)
        await self._store.close()


def _engine(config: ClusterConfig, worker_id: str) -> Engine:
    reads_for_draft = config.speculation.draft_prefill == "prefill_worker"
    draft = usable_draft(config) if reads_for_draft else None
    budget_bytes, threads = config.cache.prefill_bytes, config.prefill.threads
    kv_dtype = config.kv_dtypes.prefill
    return load_engine(
        config, worker_id, budget_bytes, threads, draft, shares_weights=False, kv_dtype=kv_dtype
    )
