"""Bearer tokens on gRPC: the server's side as an interceptor, the client's as call metadata."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc

from tandem.errors import Unauthenticated
from tandem.security import BearerTokens

AUTHORIZATION = "authorization"
OPEN_SERVICES = ("/grpc.health.v1.Health/",)  # whoever keeps the service alive has no token

# Whose call this is. The interceptor sets it in the call's own task, in which the handler runs too.
TENANT: ContextVar[str] = ContextVar("tenant", default="")

Metadata = tuple[tuple[str, str], ...]


def bearer(token: str | None) -> Metadata:
    """The metadata that carries a token."""
    return ((AUTHORIZATION, f"Bearer {token}"),) if token else ()


class BearerInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without an accepted token, but those to the health service.

    Must stand behind `tandem.rpc.ErrorInterceptor`, which puts the refusal on the wire.
    """

    def __init__(self, tokens: BearerTokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(OPEN_SERVICES):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        value = metadata.get(AUTHORIZATION, "")
        try:
            TENANT.set(self._tokens.check(value if isinstance(value, bytes) else value.encode()))
        except Unauthenticated as error:
            return _refusing(handler, error)
        return handler


def _refusing(handler: Any, error: Unauthenticated) -> Any:
    """A method of the same kind that does nothing but raise."""

    async def refuse(request: Any, context: Any) -> None:
        raise error

    kind = f"{'stream' if handler.request_streaming else 'unary'}_" + (
        "stream" if handler.response_streaming else "unary"
    )
    return getattr(grpc, f"{kind}_rpc_method_handler")(
        refuse,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
