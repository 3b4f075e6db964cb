"""Errors keep their meaning over a real connection; what is no message of ours does no harm."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from tandem import rpc
from tandem.errors import (
    REASONS,
    AlreadyExists,
    Cancelled,
    ConfigError,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    StreamBroken,
    TandemError,
    Unauthenticated,
    Unavailable,
)

SERVICE = "tandem.test.Test"
KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
ERRORS = [
    InvalidRequest("BAD_PARAM", "`temperature` must be a finite number in [0, 2]"),
    Unauthenticated("NO_TOKEN", "missing bearer token"),
    NotFound("NO_SUCH_REQUEST", "not found"),
    AlreadyExists("ID_IN_USE", "request_id is already running"),
    FailedPrecondition("STALE_HANDLE", "handle is from an earlier store epoch"),
    Overloaded("QUEUE_FULL", "server is full; retry in 800 ms", retry_after_ms=800),
    Overloaded("NO_MEMORY_FIT_NOW", "no room", metadata={"free_bytes": "7", "total_bytes": "9"}),
    Unavailable("NO_PREFILL", "no prefill worker is available", retry_after_ms=0),
    Unavailable.draining(),
    StreamBroken(37),
    DeadlineExceeded("decode", 5),
    Cancelled("ADMIN_ABORT"),
    DataLoss(),
    Internal.bug(),
    Internal.numerics(),
    InvalidRequest("BAD_PARAM", "percent % and umlaut ü, a (paren) and (error_id=no)"),
]


class Servicer:
    """All four kinds of call; each raises what it was told to, or repeats what it was sent."""

    def __init__(self, error: Exception | None = None, after: int = 0) -> None:
        self._error, self._after = error, after
        self.were_read = asyncio.Event()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def unary_unary(self, request, context):
        self._check()
        return request

    async def unary_stream(self, request, context):
        for _ in range(self._after):
            yield request
        if self._after:
            await self.were_read.wait()
        self._check()
        yield request

    async def stream_unary(self, requests, context):
        last = StringValue()
        async for request in requests:
            last = request
        self._check()
        return last

    async def stream_stream(self, requests, context):
        async for request in requests:
            self._check()
            yield request


@asynccontextmanager
async def serving(servicer, *, public=False):
    server = rpc.server(public=public)
    handlers = {
        kind: getattr(grpc, f"{kind}_rpc_method_handler")(
            getattr(servicer, kind),
            request_deserializer=StringValue.FromString,
            response_serializer=StringValue.SerializeToString,
        )
        for kind in KINDS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    async with rpc.channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def ask(channel, kind, *messages: bytes, **options) -> list[str]:
    """Send raw messages; returns what comes back, or raises gRPC's error."""
    method = getattr(channel, kind)(f"/{SERVICE}/{kind}", response_deserializer=StringValue.FromString)
    call = method(iter(messages) if kind.startswith("stream") else messages[0], **options)
    if kind.endswith("stream"):
        return [response.value async for response in call]
    return [(await call).value]


def message(text="hello") -> bytes:
    return StringValue(value=text).SerializeToString()


async def failure(channel, kind, *messages: bytes) -> TandemError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel, kind, *messages)
    return rpc.to_tandem_error(caught.value)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_without_an_error_messages_pass(kind):
    async with serving(Servicer()) as channel:
        assert await ask(channel, kind, message()) == ["hello"]


def test_every_class_of_error_is_tried_here():
    known = {kind for kind in TandemError.__subclasses__() if kind.__module__ == TandemError.__module__}
    assert {type(error) for error in ERRORS} == known - {ConfigError}
    assert {error.code for error in ERRORS} == set(REASONS.values())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.reason)
@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_is_the_same_on_the_other_side(kind, error):
    async with serving(Servicer(error)) as channel:
        found = await failure(channel, kind, message())
    assert type(found) is type(error)
    assert (found.reason, found.message, str(found)) == (error.reason, error.message, str(error))
    assert (found.error_id, found.metadata) == (error.error_id, error.metadata)
    assert (found.retry, found.code) == (error.retry, error.code)


async def test_the_status_is_readable_without_our_code():
    error = Overloaded("QUEUE_FULL", "server is full", retry_after_ms=1500, metadata={"k": "v"})
    async with serving(Servicer(error)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, "unary_unary", message())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == f"QUEUE_FULL: server is full (error_id={error.error_id})"
    trailing = dict(caught.value.trailing_metadata())
    assert trailing["retry-after-ms"] == "1500"
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "tandem")
    assert dict(info.metadata) == {"error_id": error.error_id, "k": "v"}
    assert retry.retry_delay.ToMilliseconds() == 1500


async def test_an_error_after_some_answers_follows_them():
    """gRPC drops what is unread when a failure arrives, so it waits for the reader here."""
    servicer = Servicer(StreamBroken(3), after=3)
    async with serving(servicer) as channel:
        call = channel.unary_stream(f"/{SERVICE}/unary_stream")(message())
        assert [await call.read() for _ in range(3)] == [message()] * 3
        servicer.were_read.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert rpc.to_tandem_error(caught.value).reason == "STREAM_BROKEN"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_foreign_exception_is_a_bug_whose_text_stays_in_the_log(kind, caplog):
    async with serving(Servicer(ValueError("the secret prompt"))) as channel:
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, kind, message())
    error = rpc.to_tandem_error(caught.value)
    assert (type(error), error.reason, error.message) == (Internal, "BUG", "internal error")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.details())
    assert "secret" not in str(caught.value.trailing_metadata())
    (record,) = [record for record in caplog.records if error.error_id in record.getMessage()]
    assert "the secret prompt" in caplog.text
    assert record.exc_info


async def test_an_abort_of_the_servicers_own_is_left_alone():
    class Aborting(Servicer):
        async def unary_unary(self, request, context):
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "as it said")

    async with serving(Aborting()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, "unary_unary", message())
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.OUT_OF_RANGE, "as it said")


# --- statuses that are not ours -------------------------------------------------------------------


def foreign(trailing=(), code=grpc.StatusCode.UNAVAILABLE) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata(*trailing)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details="broken")


def details(code=14, text="broken", *packed) -> tuple[str, bytes]:
    status = status_pb2.Status(code=code, message=text)
    for entry in packed:
        status.details.add().Pack(entry)
    return "grpc-status-details-bin", status.SerializeToString()


INFO = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="tandem")
CORRUPT = status_pb2.Status(code=14, message="broken")
CORRUPT.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")


@pytest.mark.parametrize(
    "trailing",
    [
        [],
        [("retry-after-ms", "soon")],
        [details()],
        [details(14, "broken", error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="elsewhere"))],
        [details(5, "broken", INFO)],  # another code than the call's
        [details(14, "other text", INFO)],
        [("grpc-status-details-bin", b"\xff\xff\xff")],
        [("grpc-status-details-bin", CORRUPT.SerializeToString())],
    ],
)
def test_what_does_not_come_from_us_is_what_the_caller_says(trailing):
    lost = Unavailable("NO_DECODE", "lost")
    error = foreign(trailing)
    assert rpc.to_tandem_error(error, lost) is lost
    assert lost.__cause__ is error
    assert rpc.to_tandem_error(error).reason == "BUG"


def test_ours_is_recognised_beside_other_details():
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(250)
    help_ = error_details_pb2.Help()
    found = rpc.to_tandem_error(foreign([details(14, "broken", help_, retry, INFO)]))
    assert (found.reason, found.message, found.retry_after_ms) == ("QUEUE_FULL", "broken", 250)


# --- messages that are none -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff", b"\x0a\x01\xff"])  # cut, too long, not UTF-8
async def test_malformed_bytes_are_a_bad_message_and_the_channel_stays_usable(kind, data):
    async with serving(Servicer()) as channel:
        error = await failure(channel, kind, data)
        assert (type(error), error.reason) == (InvalidRequest, "BAD_MESSAGE")
        assert error.message == "malformed request message"
        assert await ask(channel, kind, message()) == ["hello"]


@pytest.mark.parametrize("kind", ["stream_unary", "stream_stream"])
async def test_malformed_bytes_in_the_middle_of_a_stream(kind):
    async with serving(Servicer()) as channel:
        assert (await failure(channel, kind, message(), b"\xff", message())).reason == "BAD_MESSAGE"


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_refused(algorithm):
    async with serving(Servicer()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, "unary_unary", message("x" * 100_000), compression=algorithm)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert await ask(channel, "unary_unary", message()) == ["hello"]


@pytest.mark.parametrize(
    ("public", "limit"), [(True, rpc.API_MESSAGE_BYTES), (False, rpc.INTERNAL_MESSAGE_BYTES)]
)
async def test_messages_over_the_limit_are_refused_and_smaller_ones_pass(public, limit):
    async with serving(Servicer(), public=public) as channel:
        fits = "x" * (limit - 10)
        assert await ask(channel, "unary_unary", message(fits)) == [fits]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, "unary_unary", message("x" * (limit + 10)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await ask(channel, "unary_unary", message()) == ["hello"]


async def test_an_unknown_method_is_unimplemented():
    async with serving(Servicer()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{SERVICE}/nothing")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- servers --------------------------------------------------------------------------------------


async def test_a_port_in_use_is_a_config_error():
    first, second = rpc.server(public=True), rpc.server(public=True)
    port = rpc.bind(first, "127.0.0.1", 0)
    assert port > 0
    await first.start()
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        rpc.bind(second, "127.0.0.1", port)
    await first.stop(None)
    await second.stop(None)


async def test_a_burst_of_calls_is_answered_whole():
    """gRPC by itself drops calls at random while more than 1,000 wait to be accepted."""
    async with serving(Servicer()) as channel:
        answers = await asyncio.gather(*(ask(channel, "unary_unary", message()) for _ in range(4000)))
    assert answers == [["hello"]] * 4000


async def test_a_servicer_that_writes_through_the_context_works():
    """grpc's own health service is a coroutine, not a generator."""
    server, health = rpc.server(public=True), health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    async with rpc.channel(f"127.0.0.1:{port}") as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="x"))
        assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        await health.set("x", health_pb2.HealthCheckResponse.SERVING)
        assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        call.cancel()
        malformed = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await malformed.read()
        assert rpc.to_tandem_error(caught.value).reason == "BAD_MESSAGE"
    await server.stop(None)
