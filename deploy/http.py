"""The OpenAI API beside a router, where the settings name a port for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.server import Router
from tandem.config import ClusterConfig

if TYPE_CHECKING:
    from router.http.server import HttpServer


class HttpFront:
    """Listens when built, which raises `ConfigError` where it cannot; without a port it is nothing.

    Starlette and Uvicorn are loaded here and by nobody else.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._server: HttpServer | None = None
        if config.router.http_port is not None:
            from router.http.server import HttpServer

            self._server = HttpServer(config.router.host, config.router.http_port, config.security)

    @property
    def port(self) -> int | None:
        return self._server.port if self._server else None

    async def start(self, router: Router) -> None:
        """Serve what `router`, which has started, serves."""
        if self._server:
            from router.http.app import build_app

            await self._server.start(
                build_app(self._config, router.intake, router.dispatcher, router.batches)
            )

    async def stop(self) -> None:
        """Hang up on everybody. Call when the router has drained."""
        if self._server:
            await self._server.stop()
