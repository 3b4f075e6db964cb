"""gRPC's own retries by the published service config: of what was refused before anything came back."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from tandem import rpc
from tandem.client import TandemClient
from tandem.errors import Overloaded, TandemError, Unavailable
from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.v1 import generation_pb2_grpc, model_pb2
from tandem.sync_client import SyncTandemClient

ATTEMPTS = 4
DRAINING = Unavailable("DRAINING", "server is shutting down")
SERVICES = {
    service.full_name: service
    for module in (pb, model_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
}


class Unsteady(generation_pb2_grpc.GenerationServiceServicer):
    """Raises `error` for the first `num_failures` calls, before or behind its first event."""

    def __init__(self, num_failures: int, error: TandemError = DRAINING, *, late: bool = False) -> None:
        self.num_calls = 0
        self._num_failures, self._error, self._is_late = num_failures, error, late

    def _check(self):
        if self.num_calls <= self._num_failures:
            raise self._error

    async def Generate(self, request, context):
        self.num_calls += 1
        self._check()
        return pb.GenerateResponse(request_id="done")

    async def StreamGenerate(self, request, context):
        self.num_calls += 1
        if not self._is_late:
            self._check()
        yield pb.StreamGenerateResponse(admitted=pb.Admitted())
        self._check()
        yield pb.StreamGenerateResponse(finished=pb.Finished())


@asynccontextmanager
async def serving(servicer):
    server = rpc.server(public=True)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def ask(address: str, how: str) -> None:
    if how == "blocking":
        with SyncTandemClient(address) as client:
            await asyncio.to_thread(client.generate, "hi")
        return
    async with TandemClient(address) as client:
        if how == "unary":
            assert (await client.generate("hi")).request_id == "done"
        else:
            assert len([event async for event in client.stream("hi", resume_s=0)]) == 2


@pytest.mark.parametrize("how", ["unary", "stream", "blocking"])
async def test_a_server_that_fails_twice_is_asked_three_times(how):
    servicer = Unsteady(2)
    async with serving(servicer) as address:
        await ask(address, how)
    assert servicer.num_calls == 3


async def test_there_is_an_end_to_it():
    servicer = Unsteady(100)
    async with serving(servicer) as address:
        with pytest.raises(Unavailable, match="DRAINING"):
            await ask(address, "unary")
    assert servicer.num_calls == ATTEMPTS


async def test_what_is_no_outage_and_what_has_begun_is_asked_once():
    for servicer, kind in (
        (Unsteady(1, Overloaded("QUEUE_FULL", "server is full", retry_after_ms=50)), Overloaded),
        (Unsteady(1, late=True), Unavailable),
    ):
        async with serving(servicer) as address:
            with pytest.raises(kind):
                await ask(address, "stream")
        assert servicer.num_calls == 1


def test_the_config_names_methods_that_there_are_and_that_only_produce():
    config = json.loads(rpc.SERVICE_CONFIG)
    [method] = config["methodConfig"]
    assert method["retryPolicy"]["maxAttempts"] == ATTEMPTS
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    for name in method["name"]:
        service = SERVICES[name["service"]]
        assert "method" not in name or name["method"] in service.methods_by_name
    assert not any(name.get("method", "").startswith("Cancel") for name in method["name"])
