"""Puts a decode worker together and serves it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import grpc

from decode_worker.beginnings import StoredBeginnings
from decode_worker.decoder import Decoder
from decode_worker.drafting import make_decoder
from decode_worker.local_prefill import stall_of
from decode_worker.restore import KvRestorer
from decode_worker.reuse import BlockNames, Reuse
from decode_worker.service import DecodeServicer
from decode_worker.worker import DecodeWorker
from kvstore.client import KvClient
from kvstore.elsewhere import Elsewhere
from kvstore.pieces import PieceFormat, Pieces
from kvstore.prefix_reader import PrefixReader
from tandem.config import ClusterConfig
from tandem.draft_checkpoint import usable_draft
from tandem.engine.cores import Cores, cores_of
from tandem.engine.loading import Engine, load_engine
from tandem.engine.paged_cache import PagedCache
from tandem.engine.profiler import Profiler, profiler_of
from tandem.fingerprint import model_fingerprint
from tandem.internal import InternalPlane
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.prefix_usage import PrefixReport
from tandem.registration import WorkerLoad
from tandem.tokenizer import Tokenizer
from tandem.worker_host import WorkerHost


class DecodeServer:
    """One decode worker with its model, its pool and its gRPC server."""

    def __init__(
        self,
        host: WorkerHost,
        worker: DecodeWorker,
        restorer: KvRestorer,
        store: grpc.aio.Channel,
        kernels: str,
        profiler: Profiler | None = None,
    ) -> None:
        self._host = host
        self._restorer = restorer
        self._store = store
        self.worker = worker
        self.kernels = kernels  # what runs the model, for operators
        self._profiler = profiler

    @classmethod
    async def start(cls, config: ClusterConfig, worker_id: str, router: Awaitable[str]) -> DecodeServer:
        """Load the model, serve, register. The router, which hosts the store too, may become known while
        the model loads."""
        engine = await asyncio.to_thread(_engine, config, worker_id)
        decoder = await asyncio.to_thread(make_decoder, config.speculation, engine)
        fingerprint = model_fingerprint(config)
        router_address = await router
        plane = InternalPlane.of(config)
        store_channel = plane.channel(router_address)
        client = KvClient(store_channel, config.kvstore)
        reuse, beginnings, report = _reuse(config, engine, client, fingerprint)
        restorer = _restorer(config, engine, client, report, beginnings)
        cores = cores_of(config.cores, config.decode.threads)
        token_s = partial(restorer.token_cost.per_token_with, cores.num_cores)
        worker = DecodeWorker(
            replace(config.decode, stall_s=stall_of(config)),
            engine.model.called("prefill"),
            engine.pool,
            Tokenizer.from_dir(config.model.path),
            restorer,
            decoder,
            reuse,
            cores,
        )
        host = WorkerHost(router_address, plane)
        servicer = DecodeServicer(worker, fingerprint)
        await host.start(
            engine.worker_info(worker_id, pb.WORKER_ROLE_DECODE, fingerprint, cores.name),
            lambda server: worker_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server),
            partial(_load, engine, worker, decoder, cores, report, token_s),
            worker.audit,
        )
        profiler = profiler_of(config, worker_id, engine)
        return cls(host, worker, restorer, store_channel, engine.describe(), profiler)

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
        await self._restorer.close()
        if self._profiler is not None:
            await asyncio.to_thread(self._profiler.close)
        await self._store.close()


def _engine(config: ClusterConfig, worker_id: str) -> Engine:
    draft, kv_dtype = usable_draft(config), config.kv_dtypes.decode
    budget_bytes, threads = config.cache.decode_bytes, config.decode.threads
    return load_engine(config, worker_id, budget_bytes, threads, draft, kv_dtype=kv_dtype)


def _load(
    engine: Engine,
    worker: DecodeWorker,
    decoder: Decoder,
    cores: Cores,
    prefixes: PrefixReport | None,
    token_s: Callable[[], float],
) -> WorkerLoad:
    return WorkerLoad(
        engine.pool.num_free,
        worker.num_running,
        worker.num_waiting,
        num_cores=cores.num_cores,
        speculation=decoder.report(),
        prefixes=prefixes,
        prompt_token_s=token_s(),
    )


def _restorer(
    config: ClusterConfig,
    engine: Engine,
    client: KvClient,
    report: PrefixReport | None,
    beginnings: StoredBeginnings | None,
) -> KvRestorer:
    own, codec = _own_cache(engine), config.kvstore.codec
    return KvRestorer(client, engine.model.cache, engine.pool, own, codec, report, beginnings)


def _reuse(
    config: ClusterConfig, engine: Engine, client: KvClient, fingerprint: bytes
) -> tuple[Reuse, StoredBeginnings | None, PrefixReport | None]:
    """What is used again here, and what that brings; no report where nothing is."""
    report, beginnings = PrefixReport(), None
    pieces = Pieces(client, PieceFormat.of(config, engine.model.geometry, fingerprint), report)
    if config.cache.prefix_bytes > 0:
        reader = PrefixReader(client, pieces, Elsewhere.of(config, pieces))
        beginnings = StoredBeginnings(reader, engine.model.cache, engine.pool)
    keeps = config.cache.keep_blocks
    names = BlockNames(config.cache.block_size, report) if keeps else None
    published = pieces if config.kvstore.publish == "all" else None
    return Reuse(published, names), beginnings, report if beginnings or names else None


def _own_cache(engine: Engine) -> PagedCache | None:
    """The cache of a draft model; a draft over the target's has none of its own."""
    if engine.draft is None or engine.draft.cache is engine.model.cache:
        return None
    return engine.draft.cache
