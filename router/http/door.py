"""What stands before every HTTP endpoint: the bearer token, and errors put into their shape."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.http.errors import as_tandem_error, error_response, not_served
from tandem.security import BearerTokens

TENANT = "tandem.tenant"  # in the scope of what is behind the door
OPEN_PATHS = ("/health", "/health/live")  # whoever keeps the service alive has no token


class Door:
    """An ASGI app around another."""

    def __init__(self, app: ASGIApp, tokens: BearerTokens | None) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def note_and_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            inner = {**scope, "app": self, TENANT: self._tenant(scope)}
            await self._app(inner, receive, note_and_send)  # an app: its routes raise
        except Exception as error:
            if has_begun:  # the connection is cut, which tells the caller that something is missing
                raise
            await _response(error)(scope, receive, send)

    def _tenant(self, scope: Scope) -> str:
        """By the caller's token. Raises `Unauthenticated`."""
        if self._tokens is None or scope.get("path") in OPEN_PATHS:
            return ""
        return self._tokens.check(dict(scope["headers"]).get(b"authorization"))


def _response(error: Exception) -> Response:
    return not_served(error) if isinstance(error, HTTPException) else error_response(as_tandem_error(error))
