"""What both kinds of worker share around their work: a gRPC server, the audit, the link to the router."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable

import grpc

from tandem.audit import AuditServicer
from tandem.internal import InternalPlane
from tandem.ledger import PoolAudit
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.registration import RouterLink, WorkerLoad

IDLE_POLL_S = 0.05  # while draining: nothing tells when the last block is free


class WorkerHost:
    """Serves a worker's gRPC service and keeps it registered with the router.

    It listens on the address from which this machine reaches the router: on loopback if the router does.
    """

    def __init__(self, router_address: str, plane: InternalPlane) -> None:
        self._server = plane.server()
        host = host_towards(router_address)
        self._router = plane.channel(router_address)
        self.address = f"{host}:{plane.bind(self._server, host, 0)}"
        self._link: RouterLink | None = None
        self._is_idle: Callable[[], bool] = lambda: True

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
        self._is_idle = lambda: load().num_waiting == 0 and audit().is_empty

    async def drain(self, within_s: float) -> bool:
        """Take no new work and wait until what runs has ended. False if it has not in that time."""
        if self._link:
            await self._link.drain()
        try:
            async with asyncio.timeout(within_s):
                while not self._is_idle():  # noqa: ASYNC110 (see IDLE_POLL_S)
                    await asyncio.sleep(IDLE_POLL_S)
        except TimeoutError:
            return False
        return True

    async def stop(self, grace_s: float = 1.0) -> None:
        """Say goodbye to the router first, so that it sends no more work; then let calls end."""
        if self._link:
            await self._link.drain()
            await self._link.close()
        await self._server.stop(grace_s)
        await self._router.close()


def host_towards(address: str) -> str:
    """The IP address of this machine from which packets to `address` (host:port) leave."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting one sends nothing
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])
