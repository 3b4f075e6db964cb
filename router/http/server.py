"""Uvicorn inside the router's process and event loop, on a socket of ours, with the router's TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from tandem.config import SecurityConfig
from tandem.errors import ConfigError
from tandem.security import check_exposure, check_pair, read_public

BACKLOG = 1024
KEEP_ALIVE_S = 75  # of a connection nobody uses; more than load balancers wait
HEADER_BYTES = 16 << 10
STOP_S = 2  # for what is still being sent


class _Server(uvicorn.Server):
    """Signals belong to the process, not to one of its listeners."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Bound when built, which raises `ConfigError` where it cannot be; serves once started."""

    def __init__(self, host: str, port: int, security: SecurityConfig) -> None:
        check_exposure(host, security)
        _check_tls(security)
        self._security = security
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]

    async def start(self, app: ASGIApp) -> None:
        """Serve `app` until `stop`."""
        self._server = _Server(self._settings(app))
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Take no more connections, and hang up when what is being sent has been sent."""
        self._server.should_exit = True
        await self._task

    def _settings(self, app: ASGIApp) -> uvicorn.Config:
        security = self._security
        return uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_S,
            h11_max_incomplete_event_size=HEADER_BYTES,
            ssl_certfile=security.tls_cert,
            ssl_keyfile=security.tls_key,
            ssl_ca_certs=str(security.tls_client_ca) if security.tls_client_ca else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if security.tls_client_ca else ssl.CERT_NONE,
        )


def _check_tls(security: SecurityConfig) -> None:
    """Raise `ConfigError` for files that TLS cannot work with."""
    if security.tls_cert and security.tls_key:
        check_pair(security.tls_cert, security.tls_key)
    if security.tls_client_ca:
        read_public(security.tls_client_ca)
        try:
            ssl.create_default_context(cafile=security.tls_client_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"{security.tls_client_ca} is not a certificate in PEM form") from error


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only to a socket that says it is TCP does asyncio give TCP_NODELAY; else tokens wait 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; is the port in use (0 takes a free one)?"
        ) from error
    listener.setblocking(False)
    return listener
