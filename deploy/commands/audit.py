"""`tandem audit`: the books of every process of a running service, and what its store holds."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from deploy.access import check_address
from kvstore.listing import ObjectInfo
from tandem.audit import fetch_audit, fetch_audit_and_workers
from tandem.client import as_tandem_error
from tandem.errors import ConfigError
from tandem.internal import LOOPBACK_ONLY, InternalPlane
from tandem.ledger import PoolAudit
from tandem.pb.kv.v1 import kv_pb2, kv_pb2_grpc

TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceAudit:
    """Pools by the process that keeps the books; objects and counters of the store."""

    pools: list[tuple[str, PoolAudit]]
    objects: list[ObjectInfo]
    counters: dict[str, int]

    @property
    def is_sound(self) -> bool:
        return all(audit.is_balanced for _, audit in self.pools)


def run(server: str, limit: int, as_json: bool, plane: InternalPlane = LOOPBACK_ONLY) -> bool:
    """Show the audit; whether all books are in order. Raises `TandemError` if a process does not answer."""
    check_address(server, "SERVER")
    try:
        audit = asyncio.run(collect(server, limit, plane))
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise ConfigError(
                f"{server} is not the router's internal listener; `tandem serve` says which is"
            ) from error
        raise as_tandem_error(error, server) from error
    if as_json:
        print(json.dumps(_document(audit)))
    else:
        _show(audit, Console())
    return audit.is_sound


async def collect(server: str, limit: int, plane: InternalPlane = LOOPBACK_ONLY) -> ServiceAudit:
    """Ask the router at its internal address, the store beside it, and every worker it knows."""
    async with plane.channel(server) as router:
        books, workers = await fetch_audit_and_workers(router, TIMEOUT_S)
        stub: Any = kv_pb2_grpc.KvServiceStub(router)
        stored = await stub.ListKv(kv_pb2.ListKvRequest(limit=limit), timeout=TIMEOUT_S)
    pools = [("router", audit) for audit in books]
    for found in await asyncio.gather(*(_audit_worker(address, plane) for address in workers)):
        pools += [("worker", audit) for audit in found]
    return ServiceAudit(
        pools, [ObjectInfo.from_pb(message) for message in stored.objects], dict(stored.counters)
    )


async def _audit_worker(address: str, plane: InternalPlane) -> list[PoolAudit]:
    async with plane.channel(address) as worker:
        return await fetch_audit(worker, TIMEOUT_S)


def _document(audit: ServiceAudit) -> dict[str, Any]:
    pools = [{"process": process} | dataclasses.asdict(pool) for process, pool in audit.pools]
    return {
        "is_sound": audit.is_sound,
        "pools": pools,
        "objects": [_row(info) for info in audit.objects],
        "counters": audit.counters,
    }


def _row(info: ObjectInfo) -> dict[str, Any]:
    return {
        "kind": "prefix" if info.is_prefix else "hand-off",
        "object_id": info.key.object_id.hex(),
        "epoch": info.key.epoch,
        "state": info.state.value,
        "bytes": info.num_bytes,
        "holders": list(info.holders),
        "age_s": round(info.age_s, 3),
    }


def _show(audit: ServiceAudit, console: Console) -> None:
    rows = [
        (process, pool.pool, pool.unit, pool.total, pool.free, pool.owned, len(pool.owners), _oldest(pool))
        for process, pool in audit.pools
    ]
    columns = ("process", "pool", "unit", "total", "free", "owned", "owners", "age, s")
    console.print(_table("who owns what", columns, rows))
    console.print()
    objects = [tuple(_row(info).values()) for info in audit.objects]
    names = ("kind", "object", "epoch", "state", "bytes", "holders", "age, s")
    console.print(_table("what the store holds", names, objects))
    console.print()
    counted = {name: count for name, count in audit.counters.items() if count}
    console.print(_table("what the store counted", ("event", "times"), sorted(counted.items())))
    verdict = "all books are in order" if audit.is_sound else "[red]some books do not add up[/]"
    console.print(f"\n{verdict}")


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, min_width=len(title))
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name in ("pool", "unit", "bytes"))
    for row in rows:
        table.add_row(*(", ".join(cell) if isinstance(cell, list) else str(cell) for cell in row))
    return table


def _oldest(pool: PoolAudit) -> str:
    return f"{max((owned.age_s for owned in pool.owners), default=0.0):.1f}"
