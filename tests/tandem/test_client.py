"""The Python client against a real server: the same events and the same errors that the server meant."""

from __future__ import annotations

import asyncio
import socket
from contextlib import aclosing, asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from tandem import rpc
from tandem.client import TandemClient, generation_input
from tandem.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    StreamBroken,
    Unavailable,
)
from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from tandem.sampling import SamplingParams
from tandem.sync_client import SyncTandemClient
from tests.serving import until


class Server(generation_pb2_grpc.GenerationServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Answers as it is told and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.error: Exception | None = None
        self.late_error: Exception | None = None
        self.hangs = False
        self.num_cancelled = 0

    async def StreamGenerate(self, request, context):
        self.asked.append(request)
        try:
            yield pb.StreamGenerateResponse(admitted=pb.Admitted())
            yield pb.StreamGenerateResponse(token_chunk=pb.TokenChunk(text="hello"))
            if self.error:
                raise self.error
            if self.hangs:
                await asyncio.sleep(60)
            yield pb.StreamGenerateResponse(finished=pb.Finished())
            if self.late_error:
                raise self.late_error
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise

    async def Generate(self, request, context):
        self.asked.append(request)
        if self.error:
            raise self.error
        if self.hangs:
            await asyncio.sleep(60)
        return pb.GenerateResponse(request_id=request.input.request_id)

    async def Tokenize(self, request, context):
        return pb.TokenizeResponse(token_ids=request.text.encode())

    async def CancelGeneration(self, request, context):
        raise NotFound("NO_SUCH_REQUEST", "not found")

    async def ListModels(self, request, context):
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="tandem-8m")])


@asynccontextmanager
async def serving(port: int = 0):
    server, servicer, health = rpc.server(public=True), Server(), health_aio.HealthServicer()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = rpc.bind(server, "127.0.0.1", port)
    await server.start()
    async with TandemClient(f"127.0.0.1:{port}") as client:
        yield client, servicer, health
    await server.stop(None)


async def kinds(events) -> list[str]:
    return [event.WhichOneof("event") async for event in events]


def kinds_blocking(address: str, resume_s: float) -> list[str]:
    with SyncTandemClient(address) as client:
        return [event.WhichOneof("event") for event in client.stream("hi", resume_s=resume_s)]


async def test_a_stream_is_its_events():
    async with serving() as (client, server, _):
        events = client.stream("hi", request_id="r", priority=3)
        assert await kinds(events) == ["admitted", "token_chunk", "finished"]
        (asked,) = server.asked
        assert (asked.input.text, asked.input.request_id, asked.input.priority) == ("hi", "r", 3)


async def test_a_call_is_its_response():
    async with serving() as (client, server, _):
        response = await client.generate([1, 2, 3], SamplingParams(max_tokens=4), request_id="r")
        assert response.request_id == "r"
        (asked,) = server.asked
        assert list(asked.input.token_ids.ids) == [1, 2, 3]
        assert asked.input.sampling.max_tokens == 4


async def test_a_text_has_the_servers_tokens():
    async with serving() as (client, _, _):
        assert await client.tokenize("ab") == [97, 98]


def test_parameters_reach_the_message():
    params = SamplingParams(temperature=0.7, stop=("x",), logit_bias={5: 1.5}, seed=9)
    message = generation_input("text", params)
    assert SamplingParams.from_pb(message.sampling) == params
    assert SamplingParams.from_pb(generation_input([1]).sampling) == SamplingParams()


async def test_the_servers_errors_are_raised():
    async with serving() as (client, server, _):
        server.error = Overloaded("QUEUE_FULL", "server is full", retry_after_ms=800)
        with pytest.raises(Overloaded) as caught:
            await client.generate("hi")
        assert (caught.value.error_id, caught.value.retry_after_ms) == (server.error.error_id, 800)
        with pytest.raises(NotFound):
            await client.cancel("r")


async def test_an_error_in_the_middle_comes_after_what_was_sent():
    async with serving() as (client, server, _):
        server.error = StreamBroken(1)
        events = client.stream("hi", resume_s=0)
        assert [(await anext(events)).WhichOneof("event") for _ in range(2)] == ["admitted", "token_chunk"]
        with pytest.raises(StreamBroken):
            await anext(events)


@pytest.mark.parametrize("resume_s", [0, 30])
async def test_a_connection_lost_behind_the_end_is_no_loss(resume_s):
    """The last event came, and the status behind it did not."""
    whole = ["admitted", "token_chunk", "finished"]
    async with serving() as (client, server, _):
        server.late_error = Unavailable("DRAINING", "gone")
        assert await kinds(client.stream("hi", resume_s=resume_s)) == whole
        assert await asyncio.to_thread(kinds_blocking, client.address, resume_s) == whole
        assert len(server.asked) == 2


async def test_leaving_a_stream_early_cancels_the_request():
    async with serving() as (client, server, _):
        server.hangs = True
        async with aclosing(client.stream("hi")) as events:
            async for event in events:
                if event.WhichOneof("event") == "token_chunk":
                    break
        await until(lambda: server.num_cancelled == 1)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_deadline_is_a_deadline_whichever_side_notices_it(streams):
    async with serving() as (client, server, _):
        server.hangs = True
        call = kinds(client.stream("hi", timeout_s=0.1)) if streams else client.generate("hi", timeout_s=0.1)
        with pytest.raises(DeadlineExceeded) as caught:
            await call
        assert caught.value.reason == "DEADLINE_DECODE"


async def test_a_request_that_is_too_large_is_the_callers_mistake():
    async with serving() as (client, _, _):
        with pytest.raises(InvalidRequest) as caught:
            await client.generate("x" * (rpc.API_MESSAGE_BYTES + 1))
        assert caught.value.reason == "BAD_MESSAGE"


async def test_nobody_listening_is_said_with_the_address():
    async with TandemClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable, match=r"no answer from 127.0.0.1:1 \(UNAVAILABLE\)"):
            await client.models()


async def test_what_is_served():
    async with serving() as (client, _, _):
        assert [model.name for model in await client.models()] == ["tandem-8m"]


# --- waiting for the server -----------------------------------------------------------------------


async def test_waiting_ends_when_the_server_says_serving():
    async with serving() as (client, _, health):
        await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        waiting = asyncio.ensure_future(client.wait_until_serving(5))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        await waiting


async def test_waiting_ends_with_the_time():
    async with serving() as (client, _, health):
        await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(Unavailable, match=r"was not ready within 0\.1 s"):
            await client.wait_until_serving(0.1)


async def test_waiting_begins_before_the_server_does():
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    async with TandemClient(f"127.0.0.1:{port}") as client:
        waiting = asyncio.ensure_future(client.wait_until_serving(10))
        await asyncio.sleep(0.05)
        async with serving(port) as (_, _, health):
            await health.set("", health_pb2.HealthCheckResponse.SERVING)
            await waiting


async def test_a_closed_client_is_closed():
    async with serving() as (client, _, _):
        await client.models()
        await client.__aexit__(None, None, None)
        with pytest.raises((grpc.aio.UsageError, asyncio.CancelledError)):
            await client.models()
