"""Every process can be asked whether it leaked: the AuditService over any set of pools."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc

from tandem.ledger import Owned, PoolAudit
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc


class AuditServicer(worker_pb2_grpc.AuditServiceServicer):
    """Answers with the books of the pools that `audits` returns, and with addresses of `workers`."""

    def __init__(
        self,
        audits: Callable[[], Iterable[PoolAudit]],
        workers: Callable[[], Iterable[str]] = lambda: (),
    ) -> None:
        self._audits = audits
        self._workers = workers

    async def GetAudit(
        self, request: pb.GetAuditRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetAuditResponse:
        pools = [audit_to_pb(audit) for audit in self._audits()]
        return pb.GetAuditResponse(pools=pools, workers=self._workers())


async def fetch_audit(channel: grpc.aio.Channel, timeout_s: float = 5.0) -> list[PoolAudit]:
    """Ask the process behind `channel` for its books."""
    return (await fetch_audit_and_workers(channel, timeout_s))[0]


async def fetch_audit_and_workers(
    channel: grpc.aio.Channel, timeout_s: float = 5.0
) -> tuple[list[PoolAudit], list[str]]:
    """The same, and if it is a router, where its workers listen."""
    stub: Any = worker_pb2_grpc.AuditServiceStub(channel)
    response = await stub.GetAudit(pb.GetAuditRequest(), timeout=timeout_s)
    return [audit_from_pb(message) for message in response.pools], list(response.workers)


def audit_to_pb(audit: PoolAudit) -> pb.PoolAudit:
    return pb.PoolAudit(
        pool=audit.pool,
        unit=audit.unit,
        total=audit.total,
        free=audit.free,
        owned=audit.owned,
        owners=[
            pb.PoolOwner(
                owner=owned.owner,
                generation=owned.generation,
                amount=owned.amount,
                holds=owned.holds,
                age_s=owned.age_s,
            )
            for owned in audit.owners
        ],
        late_operations=audit.late_operations,
    )


def audit_from_pb(message: pb.PoolAudit) -> PoolAudit:
    owners = tuple(
        Owned(owner.owner, owner.generation, owner.amount, tuple(owner.holds), owner.age_s)
        for owner in message.owners
    )
    return PoolAudit(
        message.pool,
        message.unit,
        message.total,
        message.free,
        message.owned,
        owners,
        (),
        message.late_operations,
    )
