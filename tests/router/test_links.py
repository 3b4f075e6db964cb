import asyncio
import logging
from contextlib import asynccontextmanager

import grpc.aio

from router import links
from router.links import StoreLink
from tandem.internal import InternalPlane
from tandem.pb.kv.v1 import kv_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["KvService"].full_name


@asynccontextmanager
async def store(asked, port=0):
    """One that only notes what it is to forget."""

    async def forget(request, context):
        asked.append((request.tenant, request.epoch))
        return pb.ForgetKvResponse(num_objects=1)

    handler = grpc.unary_unary_rpc_method_handler(
        forget, pb.ForgetKvRequest.FromString, pb.ForgetKvResponse.SerializeToString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ForgetKv": handler}),))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def test_stored_kv_is_given_up_when_the_store_is_back():
    asked: list[tuple[str, int]] = []
    async with store(asked) as port:
        pass
    link = StoreLink(f"127.0.0.1:{port}", "router", InternalPlane())
    forgetting = asyncio.create_task(link.forget("request", "tenant", 7))
    try:
        done, _ = await asyncio.wait({forgetting}, timeout=0.3)
        assert not done
        async with store(asked, port):
            await forgetting
    finally:
        await link.close()
    assert asked == [("tenant", 7)]


async def test_a_store_that_stays_away_is_left_to_its_leases(monkeypatch, caplog):
    monkeypatch.setattr(links, "FORGET_TIMEOUT_S", 0.2)
    async with store([]) as port:
        pass
    link = StoreLink(f"127.0.0.1:{port}", "router", InternalPlane())
    try:
        with caplog.at_level(logging.WARNING):
            await link.forget("request", "tenant", 7)
    finally:
        await link.close()
    assert "could not give up stored KV" in caplog.text
