"""A service that a command talks to: one that runs, or one that lives as long as the command."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from tandem.config import ClusterConfig


class Running(NamedTuple):
    """`address` is as it was given, or host:port of gRPC; `http_url` is known of services started here."""

    address: str
    http_url: str | None = None


@asynccontextmanager
async def serving(address: str | None, config: ClusterConfig | None) -> AsyncIterator[Running]:
    """The service at the address, or without one a new one of these settings."""
    if address is not None:
        yield Running(address)
        return
    from deploy.embedded import EmbeddedService

    assert config is not None, "a service to start has settings"
    async with EmbeddedService(config) as service:
        yield Running(service.address, service.base_url.removesuffix("/v1") if service.http_address else None)
