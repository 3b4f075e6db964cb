"""How the router, the store and the workers of a service reach each other, and who else may.

On loopback in plaintext. With `internal.tls_*` every connection between them is mutual TLS: each process
shows the one certificate, which is good for `NAME` wherever the process runs, and talks to nobody without one
of the same authority. With `internal.token_file` each call carries a bearer token besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import grpc

from tandem import rpc
from tandem.client import TandemClient
from tandem.config import ClusterConfig, SecurityConfig
from tandem.errors import ConfigError
from tandem.security import BearerTokens, client_credentials, is_loopback, read_tokens, server_credentials

NAME = "tandem.internal"  # in the certificate; who has it is one of us, whatever its address


@dataclass(frozen=True, slots=True)
class InternalPlane:
    """What one process needs for it."""

    server_credentials: grpc.ServerCredentials | None = None
    channel_credentials: grpc.ChannelCredentials | None = None
    tokens: BearerTokens | None = None
    may_be_open: bool = False  # listen beyond this machine in plaintext

    @classmethod
    def of(cls, config: ClusterConfig) -> Self:
        """Read the files. Raises `ConfigError`."""
        internal, insecure = config.internal, config.security.insecure
        if internal.tls_cert is None:
            return cls(may_be_open=insecure)
        served = SecurityConfig(
            tls_cert=internal.tls_cert, tls_key=internal.tls_key, tls_client_ca=internal.tls_ca
        )
        shown = client_credentials(internal.tls_ca, internal.tls_cert, internal.tls_key)
        if internal.token_file is None:
            return cls(server_credentials(served), shown)
        token = grpc.access_token_call_credentials(read_tokens(internal.token_file)[0].token)
        return cls(
            server_credentials(served),
            grpc.composite_channel_credentials(shown, token),
            BearerTokens.from_file(internal.token_file),
        )

    def client(self, address: str) -> TandemClient:
        """Of the router's internal listener, as far as that answers what clients ask."""
        return TandemClient(address, credentials=self.channel_credentials, server_name=self.server_name)

    @property
    def server_name(self) -> str:
        """What a server's certificate must be good for; empty without TLS."""
        return NAME if self.channel_credentials is not None else ""

    def channel(self, address: str) -> grpc.aio.Channel:
        """To another process of the service."""
        return rpc.channel(address, self.channel_credentials, server_name=self.server_name)

    def server(self) -> grpc.aio.Server:
        """For the others to call; `bind` it."""
        return rpc.server(public=False, tokens=self.tokens)

    def bind(self, to: grpc.aio.Server, host: str, port: int) -> int:
        """Listen, and return the port. Raises `ConfigError`."""
        self.check_exposure(host)
        return rpc.bind(to, host, port, self.server_credentials)

    def check_exposure(self, host: str) -> None:
        """Raise `ConfigError` for an address others can reach, unless TLS guards it."""
        if not (is_loopback(host) or self.server_credentials or self.may_be_open):
            raise ConfigError(
                f"refusing to listen on {host} for the service's own processes without TLS: set "
                "internal.tls_cert, internal.tls_key and internal.tls_ca, or stay on 127.0.0.1; "
                "--insecure (security.insecure: true) listens all the same"
            )


LOOPBACK_ONLY = InternalPlane()
