"""What Ray Serve runs: one router and workers, each a shell around the class that the embedded mode runs too.

The life of a worker replica:
 1. It loads its model, and meanwhile asks Serve for the router's internal address.
 2. It serves gRPC on a free port, registers with the router under a new incarnation, and sends heartbeats.
 3. Serve asks `check_health` again and again; a replica that fails or dies is replaced.
 4. When it is to go it takes no new work, finishes what runs within the drain time, hands the rest back
    to the router, which goes on elsewhere, and leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from tandem import log
from tandem.allocator import keep_objects, keep_pages
from tandem.audit import fetch_audit
from tandem.config import ClusterConfig
from tandem.errors import ConfigError
from tandem.internal import InternalPlane

if TYPE_CHECKING:
    from decode_worker.server import DecodeServer
    from prefill_worker.server import PrefillServer

ROUTER = "Router"
LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")
ASK_ROUTER_S = 5.0


class RouterReplica:
    """The router with its store. `workers` only makes Serve deploy them with it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: str,
        network: str,
        internal_port: int,
        log_level: str,
        workers: Sequence[DeploymentHandle[Any]],
    ) -> None:
        from deploy.http import HttpFront
        from deploy.store import EmbeddedStore, leave_process
        from router.server import Router

        log.set_up("router", log_level)
        keep_pages()
        settings = self._settings = ClusterConfig.from_json(config)
        self._host = settings.router.host
        self._store = EmbeddedStore(settings, leave_process)
        self._router = Router(settings, _internal_host(network), internal_port)
        self._http = HttpFront(settings)
        await self._store.start()
        await self._router.start(
            add_services=[self._store.add_to],
            audits=self._store.audits,
            collectors=[self._store.metrics()],
        )
        await self._store.announce(self._router.internal_address)
        await self._http.start(self._router)
        keep_objects()

    async def addresses(self) -> dict[str, str]:
        """Where it listens: for gRPC and HTTP clients, for workers; and the node's own address."""
        host = _node() if self._host in EVERYWHERE else self._host
        return {
            "public": f"{host}:{self._router.port}",
            "http": "" if self._http.port is None else f"{host}:{self._http.port}",
            "internal": self._router.internal_address,
            "node": _node(),
        }

    async def demand(self) -> dict[str, float]:
        """What is asked of each side: the fields of `router.balance.Demand`."""
        return asdict(self._router.demand())

    async def __call__(self, request: Any) -> dict[str, str]:
        """Whoever comes by Serve's HTTP proxy is told where the service is, and which side is short."""
        from router.balance import Targets, advise

        return {**await self.addresses(), "advice": advise(self._router.demand(), Targets()).value}

    async def check_health(self) -> None:
        """Raises if the gRPC server does not answer."""
        await _check_answers(self._router.internal_address, self._settings)

    async def __del__(self) -> None:
        """Drain, then leave: Serve awaits this before it ends the process."""
        await self._router.stop()
        await self._http.stop()
        await self._router.close()
        await self._store.stop()


class WorkerReplica:
    """One prefill or decode worker."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, role: str, config: str, network: str, log_level: str
    ) -> None:
        context = serve.get_replica_context()
        worker_id = f"{role}-{context.replica_id.unique_id}"
        log.set_up(worker_id, log_level)
        keep_pages()
        self._settings = ClusterConfig.from_json(config)
        self._router = serve.get_deployment_handle(ROUTER, app_name=context.app_name)
        self._network = network
        address = asyncio.create_task(self._find_router())
        self._server = await _start(role, self._settings, worker_id, address)
        self._router_address = await address
        keep_objects()

    async def check_health(self) -> None:
        """Raises if the gRPC server does not answer, or if the router lives elsewhere now."""
        await _check_answers(self._server.address, self._settings)
        try:
            async with asyncio.timeout(ASK_ROUTER_S):
                address = (await self._router.addresses.remote())["internal"]
        except (TimeoutError, RayError):
            return  # the router is being replaced, which is not this worker's fault
        if address != self._router_address:
            raise RuntimeError(f"the router moved from {self._router_address} to {address}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaling goes by; nothing while the router is away."""
        try:
            async with asyncio.timeout(ASK_ROUTER_S):
                demand: dict[str, float] = await self._router.demand.remote()
        except (TimeoutError, RayError):
            return {}
        return demand

    async def __del__(self) -> None:
        """Drain, then leave: Serve awaits this before it ends the process."""
        await self._server.drain(self._settings.router.drain_s)
        await self._server.stop()

    async def _find_router(self) -> str:
        addresses: dict[str, str] = await self._router.addresses.remote()
        if self._network == "loopback" and addresses["node"] != _node():
            raise ConfigError(
                f"the router is on {addresses['node']} and this worker on {_node()}, "
                "but network is loopback; set network: node for a cluster of several machines"
            )
        return addresses["internal"]


async def _start(
    role: str, config: ClusterConfig, worker_id: str, router: asyncio.Task[str]
) -> PrefillServer | DecodeServer:
    if role == "prefill":
        from prefill_worker.server import PrefillServer

        return await PrefillServer.start(config, worker_id, router)
    from decode_worker.server import DecodeServer

    return await DecodeServer.start(config, worker_id, router)


def _internal_host(network: str) -> str:
    return _node() if network == "node" else LOOPBACK


def _node() -> str:
    """The IP address of this node."""
    return str(get_node_ip_address())  # type: ignore[no-untyped-call]


async def _check_answers(address: str, config: ClusterConfig) -> None:
    async with InternalPlane.of(config).channel(address) as own:
        await fetch_audit(own)
