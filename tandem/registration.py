"""How a worker stays known to the router: it registers, sends heartbeats, and registers again when told."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc

from tandem.errors import Unavailable
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.prefix_usage import PrefixReport
from tandem.rpc import to_tandem_error
from tandem.speculation_usage import SpeculationReport

log = logging.getLogger(__name__)

RETRY_S = 0.2
LOG_EVERY = 10  # attempts: a router that restarts is no news, one that stays away is
TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How busy a worker says it is. Shown to operators; the router's own books decide what fits."""

    free_blocks: int = 0
    num_running: int = 0
    num_waiting: int = 0
    draining: bool = False
    num_cores: int = 0  # that computed its last step
    speculation: SpeculationReport | None = None
    prefixes: PrefixReport | None = None
    prompt_token_s: float = 0.0  # that a prompt's token takes a decode worker with all its cores

    @classmethod
    def from_pb(cls, message: pb.HeartbeatRequest) -> WorkerLoad:
        speculates = message.HasField("speculation")
        return cls(
            message.free_blocks,
            message.num_running,
            message.num_waiting,
            message.draining,
            message.num_cores,
            SpeculationReport.from_pb(message.speculation) if speculates else None,
            PrefixReport.from_pb(message.prefixes) if message.HasField("prefixes") else None,
            message.prompt_token_s,
        )


class RouterLink:
    """Keeps one worker registered with one router until it is closed."""

    def __init__(
        self, channel: grpc.aio.Channel, info: pb.WorkerInfo, load: Callable[[], WorkerLoad]
    ) -> None:
        self._stub: Any = worker_pb2_grpc.RegistryServiceStub(channel)
        self._info = info
        self._load = load
        self._draining = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def drain(self) -> None:
        """Tell the router at once that no new work is wanted."""
        self._draining = True
        await self._heartbeat()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        while True:
            try:
                period_s = await self._register()
                while await self._heartbeat():  # noqa: ASYNC110 (a heartbeat is a timer, not a wait)
                    await asyncio.sleep(period_s)
            except Exception:  # the top of the loop: a worker that fell silent would be taken for lost
                log.exception("a heartbeat failed")
                await asyncio.sleep(RETRY_S)

    async def _register(self) -> float:
        for attempt in itertools.count(1):
            try:
                request = pb.RegisterWorkerRequest(info=self._info)
                response = await self._stub.RegisterWorker(request, timeout=TIMEOUT_S)
                return float(response.heartbeat_ms) / 1e3
            except grpc.aio.AioRpcError as error:
                if attempt % LOG_EVERY == 0:
                    reason = to_tandem_error(error, Unavailable("NO_ROUTER", "no answer")).reason
                    log.warning("cannot register with the router (attempt %d): %s", attempt, reason)
                await asyncio.sleep(RETRY_S)
        raise AssertionError("counting has no end")

    async def _heartbeat(self) -> bool:
        """Whether the router still knows this worker."""
        load = replace(self._load(), draining=self._draining)
        request = pb.HeartbeatRequest(
            worker_id=self._info.worker_id,
            incarnation=self._info.incarnation,
            free_blocks=load.free_blocks,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            draining=load.draining,
            num_cores=load.num_cores,
            speculation=load.speculation.to_pb() if load.speculation else None,
            prefixes=load.prefixes.to_pb() if load.prefixes else None,
            prompt_token_s=load.prompt_token_s,
        )
        try:
            return bool((await self._stub.Heartbeat(request, timeout=TIMEOUT_S)).known)
        except grpc.aio.AioRpcError:
            return False
