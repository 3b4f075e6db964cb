"""The service that a run of a queue asks: one that runs already, or an embedded one until the run ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from deploy.access import Access
from tandem.client import TandemClient
from tandem.config import ClusterConfig
from tandem.pb.v1 import model_pb2

SERVING_S = 30.0

Guard = Callable[[Awaitable[None]], Awaitable[None]]


class Serving(NamedTuple):
    """A service that answers."""

    client: TandemClient
    model: model_pb2.Model
    guard: Guard  # awaits something that needs the service, and raises why the service failed


@dataclass(frozen=True, slots=True)
class Service:
    """Where lines are sent: to a running service, or to an embedded one of `config`."""

    access: Access
    config: ClusterConfig | None
    model_path: Path | None  # the checkpoint's folder, where it is known

    @contextlib.asynccontextmanager
    async def serving(self, err: Console) -> AsyncIterator[Serving]:
        """Until the block ends. Raises `ConfigError` or `Unavailable`."""
        async with self._address(err) as (address, guard), self.access.client(address) as client:
            await client.wait_until_serving(SERVING_S)
            yield Serving(client, (await client.models())[0], guard)

    @contextlib.asynccontextmanager
    async def _address(self, err: Console) -> AsyncIterator[tuple[str, Guard]]:
        if self.access.server is not None:
            yield self.access.server, _unguarded
            return
        from deploy.embedded import EmbeddedService

        assert self.config is not None
        with err.status("starting an embedded service …"):
            service = await EmbeddedService(self.config).__aenter__()
        try:
            yield service.address, lambda awaited: service.while_healthy(_coroutine(awaited))
        finally:
            await service.__aexit__(None, None, None)


async def _unguarded(awaited: Awaitable[None]) -> None:
    await awaited


async def _coroutine(awaited: Awaitable[None]) -> None:
    await awaited


@contextlib.contextmanager
def signals(stop: asyncio.Event) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM set `stop`; yields the list of those that came."""
    loop, received = asyncio.get_running_loop(), list[int]()

    def note(number: int) -> None:
        received.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, note, number)
    try:
        yield received
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
