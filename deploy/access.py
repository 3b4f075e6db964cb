"""How a command reaches a running service: its address, the token and the certificates to show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from deploy.options import FILES
from tandem.client import TandemClient
from tandem.errors import ConfigError
from tandem.security import client_credentials, read_tokens


@dataclass(frozen=True, slots=True)
class Access:
    """Who answers, and what they want to see."""

    server: str | None  # None: a service is started
    token: str | None
    credentials: grpc.ChannelCredentials | None  # None: plaintext

    def client(self, address: str) -> TandemClient:
        return TandemClient(address, token=self.token, credentials=self.credentials)


def check_address(server: str, what: str = "--server") -> None:
    """Raise `ConfigError` unless this is host:port, as gRPC's listeners have it."""
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit() or "//" in host:
        raise ConfigError(f"{what} is host:port of the gRPC listener, such as 127.0.0.1:50051, not {server}")


def access_of(options: dict[str, Any], takes_urls: bool = False) -> Access:
    """From a command's options. Raises `ConfigError`; a URL is no `--server` unless the command takes one."""
    key_file, *files = [Path(options[name]) if options.get(name) else None for name in FILES]
    if not options["server"] and any([key_file, *files]):
        raise ConfigError("--api-key-file and the --tls options are for calls to --server; name one")
    if options["server"] and not (takes_urls and "://" in options["server"]):
        check_address(options["server"])
    return Access(
        options["server"],
        read_tokens(key_file)[0].token if key_file else None,
        client_credentials(*files) if any(files) else None,
    )
