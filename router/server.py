"""The router process: two gRPC servers, public and internal, around one dispatcher.

Public, for clients: generation, models, health, reflection. Internal, for workers: registry and audit,
and whatever else the caller hosts beside them (the embedded mode puts the KV store there).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client.registry import Collector

from router.admission import Admission
from router.balance import Demand
from router.batch_front import BatchServicer
from router.dispatch import Dispatcher
from router.gauges import RouterGauges
from router.ground import Ground
from router.grpc_front import GenerationServicer, ModelServicer
from router.intake import Intake
from router.lateness import LateShare
from router.links import StoreLink, WorkerLinks
from router.planner import Planner
from router.policy import POLICIES
from router.registry import Registry, WorkerInfo, WorkerRole
from router.registry_service import RegistryServicer
from tandem.audit import AuditServicer
from tandem.config import ClusterConfig
from tandem.fingerprint import model_fingerprint
from tandem.geometry import ModelGeometry
from tandem.internal import InternalPlane
from tandem.ledger import PoolAudit
from tandem.metrics import RouterMetrics
from tandem.pb.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.rpc import bind, server
from tandem.security import check_exposure, is_loopback, server_credentials, tokens_of
from tandem.tokenizer import Tokenizer

if TYPE_CHECKING:
    from router.batches.service import Batches

log = logging.getLogger(__name__)

TICK_S = 0.1
SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    batch_pb2.DESCRIPTOR.services_by_name["BatchService"].full_name,
)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Router:
    """Build it inside a running event loop, `start` it, and `stop` it when done."""

    def __init__(
        self, config: ClusterConfig, internal_host: str = "127.0.0.1", internal_port: int = 0
    ) -> None:
        check_exposure(config.router.host, config.security)
        self._plane = InternalPlane.of(config)
        self._plane.check_exposure(internal_host)
        self._config = config
        self._geometry = ModelGeometry.from_path(config.model.path)
        self._fingerprint = model_fingerprint(config)
        self._tokenizer = Tokenizer.from_dir(config.model.path)
        self.registry = Registry(
            config.router.heartbeat_s, config.router.worker_timeout_s, fingerprint=self._fingerprint
        )
        self._metrics = RouterMetrics(config.router.itl_limit_s)
        self._late_share = LateShare()
        self.intake = Intake(config, self._geometry, self._tokenizer, self._metrics)
        self._ready = asyncio.Event()
        self.registry.subscribe(on_join=self._note_join)
        self._admission = Admission(
            POLICIES[config.router.policy](), prefill_fallback=config.router.prefill_fallback
        )
        self._admission.follow(self.registry)
        self._admission.set_store(config.cache.store_bytes)
        self._links = WorkerLinks(self.registry, f"router-{secrets.token_hex(4)}", self._plane)
        self.batches: Batches | None = None
        if config.batches.dir is not None:
            from router.batches.opening import open_batches

            fingerprint = self._fingerprint.hex()
            self.batches = open_batches(config, fingerprint, self.intake, lambda: self.dispatcher)
        self._public = server(public=True, tokens=tokens_of(config.security))
        self._internal = self._plane.server()
        self.port = bind(
            self._public, config.router.host, config.router.port, server_credentials(config.security)
        )
        bound = self._plane.bind(self._internal, internal_host, internal_port)
        self.internal_address = f"{internal_host}:{bound}"
        self._health = health.aio.HealthServicer()

    async def start(
        self,
        store_address: str | None = None,
        add_services: Sequence[Callable[[grpc.aio.Server], None]] = (),
        audits: Callable[[], Sequence[PoolAudit]] = tuple,
        collectors: Sequence[Collector] = (),
    ) -> None:
        """Begin to serve. The store is at `store_address`, or among the services added here."""
        self._store = StoreLink(store_address or self.internal_address, self._links.router_id, self._plane)
        planner = Planner(self._config, self._geometry, self._admission, self._metrics)
        ground = Ground(planner, self._links, self._store, self._metrics)
        self.dispatcher = Dispatcher(ground, self._config.router.max_requests_per_tenant)
        if self.batches is not None:
            self.batches.start()
        for collector in (RouterGauges(self.dispatcher, self._admission, self.registry), *collectors):
            self._metrics.add(collector)
        self._add_public_services()
        worker_pb2_grpc.add_RegistryServiceServicer_to_server(RegistryServicer(self.registry), self._internal)
        worker_pb2_grpc.add_AuditServiceServicer_to_server(
            AuditServicer(
                lambda: [*self.dispatcher.audit(), *audits()],
                lambda: [view.info.address for view in self.registry.views()],
            ),
            self._internal,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._internal)
        for add in add_services:
            add(self._internal)
        await self._say_serving(False)
        await self._internal.start()
        await self._public.start()
        self._housekeeping = asyncio.get_running_loop().create_task(self._keep_house())

    @property
    def is_ready(self) -> bool:
        """Whether at least one worker of each kind takes work."""
        return all(self.registry.ready(role) for role in (WorkerRole.PREFILL, WorkerRole.DECODE))

    def demand(self) -> Demand:
        """What is asked of each side now, for whoever scales them."""
        prefills, decodes = map(self._admission.candidates, (WorkerRole.PREFILL, WorkerRole.DECODE))
        waiting = self.dispatcher.planner.snapshot().waiting
        return Demand(
            num_prefill=len(prefills),
            num_decode=len(decodes),
            queued_tokens=sum(worker.queued_tokens for worker in prefills),
            decode_blocks=sum(worker.num_blocks for worker in decodes),
            reserved_blocks=sum(worker.num_blocks - worker.free_blocks for worker in decodes),
            waiting_blocks=sum(need * count for need, count in waiting.items()),
            late_share=self._late_share.value,
        )

    async def ready(self) -> None:
        """Until there has been a worker of each kind."""
        await self._ready.wait()

    async def stop(self, drain_s: float | None = None) -> None:
        """Not serving first, then let running requests finish, then end the rest. Workers may still leave."""
        await self._health.enter_graceful_shutdown()
        if self.batches is not None:
            await self.batches.stop()
        await self.dispatcher.drain(self._config.router.drain_s if drain_s is None else drain_s)
        await self._public.stop(grace=1.0)
        await self._links.close()

    async def close(self) -> None:
        """Hang up on everybody. Call after `stop`, when the workers have gone."""
        self._housekeeping.cancel()
        await self._links.close()
        await self._store.close()
        await self._internal.stop(grace=0.5)

    def _note_join(self, info: WorkerInfo) -> None:
        log.info("%s worker %s joined: %d blocks", info.role.name.lower(), info.worker_id, info.num_blocks)
        if self.is_ready:
            self._ready.set()

    def _add_public_services(self) -> None:
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationServicer(self.dispatcher, self.intake), self._public
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self._model()), self._public)
        batch_pb2_grpc.add_BatchServiceServicer_to_server(BatchServicer(self.batches), self._public)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._public)
        if is_loopback(self._config.router.host):  # what there is, is nobody else's business
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._public)

    def _model(self) -> model_pb2.Model:
        return model_pb2.Model(
            name=self._config.model.served_name,
            max_context=self._geometry.max_context,
            vocab_size=self._geometry.vocab_size,
            kv_bytes_per_token=self._geometry.kv_bytes_per_token(self._config.kv_dtypes.decode),
            block_size=self._config.cache.block_size,
            fingerprint=self._fingerprint.hex(),
        )

    async def _say_serving(self, is_serving: bool) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, SERVING if is_serving else NOT_SERVING)

    async def _keep_house(self) -> None:
        was_ready: bool | None = None
        while True:
            for lost in self.registry.expire():
                log.warning("lost worker %s: no heartbeat", lost.worker_id)
            self.dispatcher.planner.tick()
            tokens = self._metrics.tokens
            self._late_share.sample(time.monotonic(), tokens.num_gaps, tokens.num_late)
            if self.is_ready != was_ready:
                was_ready = self.is_ready
                await self._say_serving(was_ready)
            await asyncio.sleep(TICK_S)
