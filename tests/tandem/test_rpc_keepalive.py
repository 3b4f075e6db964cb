"""Idle connections stay: a server accepts the keepalive pings that our own clients send."""

from __future__ import annotations

import asyncio

import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tandem import rpc


@pytest.mark.slow
async def test_an_idle_stream_outlives_many_keepalives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fast motion, with the same options; a server with gRPC's own limit hangs up after three pings."""
    monkeypatch.setattr(rpc, "KEEPALIVE_MS", 1000)
    monkeypatch.setattr(rpc, "MIN_PING_INTERVAL_MS", 500)
    server = rpc.server(public=True)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    channel = rpc.channel(f"127.0.0.1:{port}")
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
    silence = asyncio.ensure_future(call.read())
    done, _ = await asyncio.wait({silence}, timeout=5.0)
    assert not done, silence
    call.cancel()
    await asyncio.wait({silence})
    await channel.close()
    await server.stop(0)


def test_our_clients_ping_less_often_than_our_servers_allow() -> None:
    assert rpc.KEEPALIVE_MS > rpc.MIN_PING_INTERVAL_MS
