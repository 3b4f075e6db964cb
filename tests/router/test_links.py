import grpc.aio
import pytest

from router import links
from router.links import StoreLink
from tandem.internal import InternalPlane
from tandem.pb.kv.v1 import kv_pb2 as pb


class DullStore:
    """Answers only after so many calls that got nothing."""

    def __init__(self, num_failures):
        self.num_failures = num_failures
        self.asked = []

    async def forget(self, request, context):
        self.asked.append((request.request_id, request.tenant, request.epoch))
        if len(self.asked) <= self.num_failures:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no processor for it")
        return pb.ForgetKvResponse(num_objects=1)


@pytest.mark.parametrize(("num_failures", "num_calls"), [(0, 1), (2, 3), (9, links.FORGET_TRIES)])
async def test_stored_kv_is_given_up_again_where_the_store_did_not_answer(
    monkeypatch, num_failures, num_calls
):
    monkeypatch.setattr(links, "FORGET_PAUSE_S", 0.01)
    store, server = DullStore(num_failures), grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        store.forget, pb.ForgetKvRequest.FromString, pb.ForgetKvResponse.SerializeToString
    )
    service = pb.DESCRIPTOR.services_by_name["KvService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"ForgetKv": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = StoreLink(f"127.0.0.1:{port}", "router", InternalPlane())
    try:
        await link.forget("request", "tenant", 7)
    finally:
        await link.close()
        await server.stop(None)
    assert store.asked == [store.asked[0]] * num_calls
    assert store.asked[0][1:] == ("tenant", 7)
