"""The registry's gRPC face: workers announce themselves and say that they are alive."""

from __future__ import annotations

from typing import Any

import grpc

from router.registry import Registry, WorkerInfo
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.registration import WorkerLoad


class RegistryServicer(worker_pb2_grpc.RegistryServiceServicer):
    """Passes both calls to the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def RegisterWorker(
        self, request: pb.RegisterWorkerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.RegisterWorkerResponse:
        self._registry.register(WorkerInfo.from_pb(request.info))
        return pb.RegisterWorkerResponse(heartbeat_ms=int(1e3 * self._registry.heartbeat_s))

    async def Heartbeat(
        self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.HeartbeatResponse:
        load = WorkerLoad.from_pb(request)
        return pb.HeartbeatResponse(
            known=self._registry.heartbeat(request.worker_id, request.incarnation, load)
        )
