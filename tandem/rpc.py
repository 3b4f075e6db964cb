"""gRPC the same way everywhere: limits, channels, and errors that keep their meaning across the wire.

A servicer raises `TandemError`; `ErrorInterceptor` turns it into a status with google.rpc.ErrorInfo
(reason, error_id) and RetryInfo. Anything else becomes INTERNAL BUG with an id, and its text stays
in the log. A client gets the same `TandemError` back from `to_tandem_error`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tandem.errors import ConfigError, Internal, InvalidRequest, TandemError, error_from_reason
from tandem.rpc_auth import BearerInterceptor
from tandem.security import BearerTokens

log = logging.getLogger(__name__)

DOMAIN = "tandem"
RETRY_AFTER = "retry-after-ms"
IDENTITY_ONLY = 1  # bit set of accepted compressions: a compressed bomb is refused by gRPC itself

KEEPALIVE_MS = 30_000
MIN_PING_INTERVAL_MS = 20_000  # a server hangs up on peers that ping more often: keep it below KEEPALIVE_MS
API_MESSAGE_BYTES = 1 << 20
INTERNAL_MESSAGE_BYTES = 5 << 20  # one KV chunk of at most 4 MiB and its header

# gRPC's own retries, for clients in any language: of calls that were refused before anything came back.
SERVICE_CONFIG = (Path(__file__).parent / "service_config.json").read_text()

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_MALFORMED = object()

Options = list[tuple[str, int | str]]

# Calls that wait for a server's attention. Of more than 1,000 gRPC drops some at random, as CANCELLED; what
# is too much is for the server to say, in words (`QUEUE_FULL`).
MAX_PENDING = 1 << 20
PENDING: Options = [
    ("grpc.server.max_pending_requests", MAX_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
]


def _options(message_bytes: int) -> Options:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server(*, public: bool, tokens: BearerTokens | None = None) -> grpc.aio.Server:
    """An aio server with our limits and error contract. Public ones take small messages only.

    With `tokens` every call but those to the health service must carry one.
    """
    options = [
        *_options(API_MESSAGE_BYTES if public else INTERNAL_MESSAGE_BYTES),
        *PENDING,
        ("grpc.so_reuseport", 0),  # two servers must not share a port silently
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.compression_enabled_algorithms_bitset", IDENTITY_ONLY),
    ]
    guards = [BearerInterceptor(tokens)] if tokens else []
    return grpc.aio.server(interceptors=[ErrorInterceptor(), *guards], options=options)


def channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    retries: bool = False,
    server_name: str = "",
) -> grpc.aio.Channel:
    """A channel of its own (not shared with others to the same address); plaintext without credentials.

    With `retries` it sends again, by itself, what `SERVICE_CONFIG` says may be sent again. `server_name` is
    what the server's certificate must be good for, if that is not its address.
    """
    if credentials is not None:
        named: Options = [("grpc.ssl_target_name_override", server_name)] if server_name else []
        options = [*_channel_options(retries), *named]
        return grpc.aio.secure_channel(address, credentials, options=options)
    return grpc.aio.insecure_channel(address, options=_channel_options(retries))


def blocking_channel(
    address: str, credentials: grpc.ChannelCredentials | None = None, *, retries: bool = False
) -> grpc.Channel:
    """The same for code without an event loop."""
    if credentials is not None:
        return grpc.secure_channel(address, credentials, options=_channel_options(retries))
    return grpc.insecure_channel(address, options=_channel_options(retries))


def _channel_options(retries: bool) -> Options:
    again: Options = [("grpc.service_config", SERVICE_CONFIG)] if retries else [("grpc.enable_retries", 0)]
    return [
        *again,
        *_options(INTERNAL_MESSAGE_BYTES),
        ("grpc.use_local_subchannel_pool", 1),
        # The default backs off for up to 120 s, in which a peer that is back would still look dead.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def bind(to: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
    """Listen on host:port and return the port; raises `ConfigError` if it is taken."""
    address = f"{f'[{host}]' if ':' in host else host}:{port}"
    try:
        bound = to.add_secure_port(address, credentials) if credentials else to.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise ConfigError(
            f"cannot listen on {host}:{port}: the port is in use (0 takes a free one), "
            "or this is no address of this machine"
        )
    return bound


def status_of(error: TandemError) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always, RetryInfo where waiting helps."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata={"error_id": error.error_id, **error.metadata}
    )
    details = [any_pb2.Any()]
    details[0].Pack(info)
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(any_pb2.Any())
        details[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=error.code.grpc_number, message=str(error), details=details)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TandemError) -> None:
    """End the call with the error's status. Always raises."""
    status = rpc_status.to_status(status_of(error))
    trailing = list(cast(Any, status).trailing_metadata)
    if error.retry_after_ms is not None:
        trailing.append((RETRY_AFTER, str(error.retry_after_ms)))
    await context.abort(_CODES[error.code.grpc_number], str(error), tuple(trailing))


def to_tandem_error(error: grpc.aio.AioRpcError, otherwise: TandemError | None = None) -> TandemError:
    """What the peer meant. A status without our ErrorInfo (a lost connection, say) becomes `otherwise`."""
    try:
        status = rpc_status.from_call(cast(Any, error))
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        found = [detail.Unpack(info) or detail.Unpack(retry) for detail in status.details] if status else []
    except (ValueError, DecodeError):  # details of another call, or none of protobuf's: not from us
        found = []
    if found and info.domain == DOMAIN:
        return _rebuild(error, info, retry)
    if otherwise is None:
        otherwise = Internal.bug()
    otherwise.__cause__ = error
    return otherwise


def _rebuild(
    error: grpc.aio.AioRpcError, info: error_details_pb2.ErrorInfo, retry: error_details_pb2.RetryInfo
) -> TandemError:
    metadata = dict(info.metadata)
    error_id = metadata.pop("error_id", "")
    message = (error.details() or "").removeprefix(f"{info.reason}: ").removesuffix(f" (error_id={error_id})")
    after_ms = retry.retry_delay.ToMilliseconds() if retry.HasField("retry_delay") else None
    rebuilt = error_from_reason(info.reason, message, retry_after_ms=after_ms, metadata=metadata)
    rebuilt.error_id = error_id
    return rebuilt


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler: malformed bytes and raised errors leave as the documented status."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        kind = f"{'stream' if handler.request_streaming else 'unary'}_" + (
            "stream" if handler.response_streaming else "unary"
        )
        wrap = _streaming if handler.response_streaming else _unary
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(getattr(handler, kind), handler.request_streaming),
            request_deserializer=_safe(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _safe(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """gRPC answers UNKNOWN with the decoder's text when a deserializer raises; so it never does."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:
            return _MALFORMED

    return parse


def _check(request: Any) -> Any:
    if request is _MALFORMED:
        raise InvalidRequest("BAD_MESSAGE", "malformed request message")
    return request


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _check(request)


def _admit(request: Any, streaming: bool) -> Any:
    return _checked(request) if streaming else _check(request)


def _unary(behavior: Any, streaming: bool) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behavior(_admit(request, streaming), context)
        except Exception as error:
            return await _abort_for(context, error)

    return call


def _streaming(behavior: Any, streaming: bool) -> Any:
    if not inspect.isasyncgenfunction(behavior):  # it writes through the context (grpc's own health service)
        return _unary(behavior, streaming)

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in behavior(_admit(request, streaming), context):
                yield response
        except Exception as error:
            await _abort_for(context, error)

    return call


async def _abort_for(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, TandemError):
        bug = Internal.bug()
        log.exception("unforeseen error %s", bug.error_id, exc_info=error)
        error = bug
    await abort(context, error)
