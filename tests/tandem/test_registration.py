"""A worker stays known to its router through every restart of either, and its host serves the audit."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import grpc
import pytest

from tandem import registration, rpc
from tandem.audit import AuditServicer, audit_from_pb, audit_to_pb, fetch_audit
from tandem.errors import InvalidRequest
from tandem.internal import InternalPlane
from tandem.ledger import Ledger, PoolAudit
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.registration import RouterLink, WorkerLoad
from tandem.worker_host import WorkerHost, host_towards
from tests.serving import until

INFO = pb.WorkerInfo(worker_id="prefill-0", incarnation="a", role=pb.WORKER_ROLE_PREFILL, num_blocks=7)


class FakeRouter(worker_pb2_grpc.RegistryServiceServicer):
    """Remembers who registered, until it is told to forget."""

    def __init__(self) -> None:
        self.registered: list[pb.WorkerInfo] = []
        self.heartbeats: list[pb.HeartbeatRequest] = []
        self.known: set[str] = set()
        self.refuses = 0

    async def RegisterWorker(self, request, context):
        if self.refuses:
            self.refuses -= 1
            raise InvalidRequest("BAD_MESSAGE", "not now")
        self.registered.append(request.info)
        self.known.add(request.info.incarnation)
        return pb.RegisterWorkerResponse(heartbeat_ms=10)

    async def Heartbeat(self, request, context):
        self.heartbeats.append(request)
        return pb.HeartbeatResponse(known=request.incarnation in self.known)


async def serve(router: FakeRouter, port: int = 0) -> tuple[grpc.aio.Server, int]:
    server = rpc.server(public=False)
    worker_pb2_grpc.add_RegistryServiceServicer_to_server(router, server)
    port = rpc.bind(server, "127.0.0.1", port)
    await server.start()
    return server, port


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(registration, "RETRY_S", 0.02)


@asynccontextmanager
async def linked(load=lambda: WorkerLoad(5, 1, 2), router=None):
    router = router or FakeRouter()
    server, port = await serve(router)
    async with rpc.channel(f"127.0.0.1:{port}") as channel:
        link = RouterLink(channel, INFO, load)
        yield router, link
        await link.close()
    await server.stop(None)


async def test_a_worker_registers_and_says_how_busy_it_is():
    async with linked() as (router, _):
        await until(lambda: len(router.heartbeats) >= 3)
        assert router.registered == [INFO]
        beat = router.heartbeats[-1]
        assert (beat.worker_id, beat.incarnation) == ("prefill-0", "a")
        assert (beat.free_blocks, beat.num_running, beat.num_waiting, beat.draining) == (5, 1, 2, False)


async def test_a_router_that_forgot_the_worker_hears_of_it_again():
    async with linked() as (router, _):
        await until(lambda: router.heartbeats)
        router.known.clear()
        await until(lambda: len(router.registered) == 2)
        await until(lambda: router.known)


async def test_a_refused_registration_is_tried_again():
    router = FakeRouter()
    router.refuses = 3
    async with linked(router=router):
        await until(lambda: router.heartbeats)
        assert len(router.registered) == 1


async def test_a_router_that_restarts_hears_of_the_worker_again():
    first, second = FakeRouter(), FakeRouter()
    server, port = await serve(first)
    async with rpc.channel(f"127.0.0.1:{port}") as channel:
        link = RouterLink(channel, INFO, lambda: WorkerLoad(0, 0, 0))
        await until(lambda: first.heartbeats)
        await server.stop(None)
        await asyncio.sleep(0.05)
        server, _ = await serve(second, port)
        await until(lambda: second.heartbeats, within_s=10)
        assert second.registered == [INFO]
        await link.close()
        await server.stop(None)


async def test_draining_is_said_at_once_and_goes_on():
    async with linked() as (router, link):
        await until(lambda: router.heartbeats)
        await link.drain()
        assert router.heartbeats[-1].draining
        router.known.clear()
        await until(lambda: len(router.registered) == 2 and router.heartbeats[-1].incarnation in router.known)
        await until(lambda: router.heartbeats[-1].draining)


async def test_a_load_that_cannot_be_told_does_not_silence_the_worker():
    calls = 0

    def load() -> WorkerLoad:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("pool is gone for a moment")
        return WorkerLoad(1, 0, 0)

    async with linked(load) as (router, _):
        await until(lambda: len(router.heartbeats) >= 4)
        assert len(router.registered) == 2


async def test_after_closing_there_are_no_more_heartbeats():
    async with linked() as (router, link):
        await until(lambda: router.heartbeats)
        await link.close()
        seen = len(router.heartbeats)
        await asyncio.sleep(0.05)
        assert len(router.heartbeats) == seen


# --- the host -------------------------------------------------------------------------------------


async def test_a_host_serves_registers_with_its_address_and_says_goodbye():
    router, added = FakeRouter(), []
    server, port = await serve(router)
    ledger = Ledger("prefill", "blocks", 9)
    hosts = [WorkerHost(f"127.0.0.1:{port}", InternalPlane()) for _ in range(2)]
    for host in hosts:
        await host.start(
            pb.WorkerInfo(worker_id="w"), added.append, lambda: WorkerLoad(9, 0, 0), ledger.audit
        )
    await until(lambda: len(router.registered) == 2)
    assert {info.address for info in router.registered} == {host.address for host in hosts}
    assert len({info.incarnation for info in router.registered}) == 2, "each start has a name of its own"
    assert len(added) == 2
    async with rpc.channel(hosts[0].address) as channel:
        (audit,) = await fetch_audit(channel)
        assert audit == ledger.audit()
    for host in hosts:
        await host.stop(grace_s=0)
        assert router.heartbeats[-1].draining
    await server.stop(None)


async def test_a_host_whose_router_is_gone_stops_all_the_same():
    router = FakeRouter()
    server, port = await serve(router)
    host = WorkerHost(f"127.0.0.1:{port}", InternalPlane())
    await host.start(INFO, lambda server: None, lambda: WorkerLoad(0, 0, 0), Ledger("p", "blocks", 1).audit)
    await until(lambda: router.heartbeats)
    await server.stop(None)
    async with asyncio.timeout(5):
        await host.stop(grace_s=0)


async def test_a_host_drains_until_nothing_runs_waits_or_is_held():
    router = FakeRouter()
    server, port = await serve(router)
    host = WorkerHost(f"127.0.0.1:{port}", InternalPlane())
    ledger, loads = Ledger("decode", "blocks", 9), [WorkerLoad(9, 0, 1)]
    await host.start(INFO, lambda server: None, lambda: loads[0], ledger.audit)
    await until(lambda: router.registered)
    assert not await host.drain(within_s=0.1), "one waits"
    assert router.heartbeats[-1].draining

    ledger.reserve("a", 3)
    loads[0] = WorkerLoad(6, 1, 0)
    draining = asyncio.create_task(host.drain(within_s=10))
    await asyncio.sleep(0.2)
    assert not draining.done(), "one runs"
    ledger.release("a")
    assert await draining
    await host.stop(grace_s=0)
    await server.stop(None)


def test_a_host_listens_where_the_router_can_reach_it():
    assert host_towards("127.0.0.1:50051") == "127.0.0.1"
    try:
        here = host_towards("198.51.100.1:50051")  # of a network for documentation: nothing is sent to it
    except OSError:
        pytest.skip("this machine has no network")
    assert here != "127.0.0.1"
    with socket.socket() as listener:
        listener.bind((here, 0))  # so it is one of this machine's


async def test_a_host_that_never_started_stops():
    await WorkerHost("127.0.0.1:1", InternalPlane()).stop()


# --- the audit ------------------------------------------------------------------------------------


def make_ledger() -> Ledger:
    ledger = Ledger("decode", "blocks", 10)
    ledger.reserve("a", 3, generation=2)
    ledger.hold("a", "restore", generation=2)
    ledger.reserve("b", 1)
    ledger.release("nobody")
    return ledger


def test_an_audit_survives_the_wire():
    audit = make_ledger().audit()
    found = audit_from_pb(pb.PoolAudit.FromString(audit_to_pb(audit).SerializeToString()))
    assert found == audit
    assert found.is_balanced
    assert not found.is_empty
    assert [(owned.owner, owned.generation, owned.holds) for owned in found.owners] == [
        ("a", 2, ("request", "restore")),
        ("b", 0, ("request",)),
    ]
    assert found.late_operations == 1


async def test_every_pool_of_a_process_is_in_its_audit():
    server = rpc.server(public=False)
    audits = [make_ledger().audit(), Ledger("store", "bytes", 1 << 40).audit()]
    worker_pb2_grpc.add_AuditServiceServicer_to_server(AuditServicer(lambda: audits), server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    async with rpc.channel(f"127.0.0.1:{port}") as channel:
        found: list[PoolAudit] = await fetch_audit(channel)
        assert found == audits
        assert found[1].is_empty
    await server.stop(None)
