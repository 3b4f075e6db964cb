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


def access_of(options: dict[str, Any]) -> Access:
    """From a command's options. Raises `ConfigError`."""
    key_file, *files = [Path(options[name]) if options.get(name) else None for name in FILES]
    if not options["server"] and any([key_file, *files]):
        raise ConfigError("--api-key-file and the --tls options are for calls to --server; name one")
    return Access(
        options["server"],
        read_tokens(key_file)[0].token if key_file else None,
        client_credentials(*files) if any(files) else None,
    )
