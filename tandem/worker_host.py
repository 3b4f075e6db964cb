"""What both kinds of worker share around their work: a gRPC server, the audit, the link to the router."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import grpc

from tandem.audit import AuditServicer
from tandem.ledger import PoolAudit
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.registration import RouterLink, WorkerLoad
from tandem.rpc import bind, channel, server


class WorkerHost:
    """Serves a worker's gRPC service and keeps it registered with the router."""

    def __init__(self, router_address: str, host: str = "127.0.0.1") -> None:
        self._server = server(public=False)
        self._router = channel(router_address)
        self.address = f"{host}:{bind(self._server, host, 0)}"
        self._link: RouterLink | None = None

    async def start(
        self,
        info: pb.WorkerInfo,
        add_service: Callable[[grpc.aio.Server], None],
        load: Callable[[], WorkerLoad],
        audit: Callable[[], PoolAudit],
    ) -> None:
        """Serve, then register. `info` needs no address and no incarnation; they are filled in."""
        add_service(self._server)
        worker_pb2_grpc.add_AuditServiceServicer_to_server(AuditServicer(lambda: [audit()]), self._server)
        await self._server.start()
        complete = pb.WorkerInfo()
        complete.CopyFrom(info)
        complete.address, complete.incarnation = self.address, secrets.token_hex(8)
        self._link = RouterLink(self._router, complete, load)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Say goodbye to the router first, so that it sends no more work; then let calls end."""
        if self._link:
            await self._link.drain()
            await self._link.close()
        await self._server.stop(grace_s)
        await self._router.close()
