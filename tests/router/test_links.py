import asyncio
import logging
from contextlib import asynccontextmanager

import grpc.aio

from router import links
from router.links import StoreLink
from tandem.internal import InternalPlane
from tandem.pb.kv.v1 import kv_pb2 as pb
from tandem.request import Request
from tandem.sampling import SamplingParams

ATTEMPTED = Request(
    request_id="request",
    token_ids=(1,),
    num_prompt_tokens=1,
    sampling=SamplingParams(),
    max_tokens=1,
    seed=0,
    deadline_s=0.0,
    tenant="tenant",
)
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
    link.forget(ATTEMPTED, 7)
    settling = asyncio.create_task(link.settle())
    try:
        done, _ = await asyncio.wait({settling}, timeout=0.3)
        assert not done
        async with store(asked, port):
            await settling
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
            link.forget(ATTEMPTED, 7)
            await link.settle()
    finally:
        await link.close()
    assert "could not give up stored KV" in caplog.text
