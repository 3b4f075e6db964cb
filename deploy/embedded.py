"""The embedded service: a small process tree on one machine, supervised by whoever starts it.

router + store ─┬─ prefill-0      each a process of its own, all on loopback;
                └─ decode-0       a worker that dies is started again, a few times
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tandem.config import ClusterConfig, CoresConfig
from tandem.errors import ConfigError, TandemError, Unavailable
from tandem.internal import InternalPlane
from tandem.signals import send

READY_S = 120.0
STOP_S = 10.0
EXIT_CONFIG = 2  # of a process that says why it cannot run
MAX_RESTARTS = 3  # in RESTART_WINDOW_S; more is a crash loop
RESTART_WINDOW_S = 60.0

T = TypeVar("T")


@dataclass(slots=True)
class _Child:
    """One process and its history."""

    role: str
    worker_id: str
    process: Process | None = None
    starts: deque[float] = field(default_factory=deque)


class EmbeddedService:
    """`async with EmbeddedService(config) as service` serves at `service.address` until the block ends."""

    def __init__(
        self,
        config: ClusterConfig,
        num_prefill: int = 1,
        num_decode: int = 1,
        log_level: str = "WARNING",
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.config = config
        self.address = ""
        self.http_address = ""  # of the OpenAI API, where the settings ask for it
        self.internal_address = ""
        self.kernels: dict[str, str] = {}  # what runs the model, by worker
        self._log_level = log_level
        self._on_event = on_event
        self._router = _Child("router", "router")
        self._workers = [
            *(_Child("prefill", f"prefill-{index}") for index in range(num_prefill)),
            *(_Child("decode", f"decode-{index}") for index in range(num_decode)),
        ]
        self._watchers: list[asyncio.Task[None]] = []
        self._settings = config  # of its processes
        self._claims = -1  # a file without a name, by which workers share the cores
        self._stopping = False
        self._failed: asyncio.Future[TandemError] = asyncio.get_running_loop().create_future()

    @property
    def base_url(self) -> str:
        """What OpenAI's clients want to know."""
        return f"{'https' if self.config.security.tls_cert else 'http'}://{self.http_address}/v1"

    async def __aenter__(self) -> Self:
        """Start everything and wait until it serves. Raises `ConfigError` or `Unavailable`."""
        self._settings = self._sharing_cores()
        try:
            await asyncio.gather(*(self._spawn(child) for child in (self._router, *self._workers)))
            facts = await self._facts(self._router)
            self.address = f"{self.config.router.host}:{facts['port']}"
            if facts["http_port"] is not None:
                self.http_address = f"{self.config.router.host}:{facts['http_port']}"
            self.internal_address = str(facts["internal"])
            self._watchers = [asyncio.create_task(self._watch(child)) for child in self._workers]
            self._watchers.append(asyncio.create_task(self._watch_router()))
            for worker in self._workers:
                self._tell(worker, self.internal_address)
            await self._until_ready()
            for worker in self._workers:
                self.kernels[worker.worker_id] = str((await self._facts(worker))["kernels"])
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The router drains first, then the workers leave."""
        self._stopping = True
        await self._end(self._router)
        await asyncio.gather(*(self._end(worker) for worker in self._workers))
        for watcher in self._watchers:
            watcher.cancel()
        if self._watchers:
            await asyncio.wait(self._watchers)
        if self._claims >= 0:
            os.close(self._claims)
            self._claims = -1

    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        children = (self._router, *self._workers)
        return {child.worker_id: child.process.pid for child in children if child.process}

    def _sharing_cores(self) -> ClusterConfig:
        """Workers share the machine's cores, unless the settings give either side threads of its own."""
        config = self.config
        if config.prefill.threads or config.decode.threads or config.cores.claims:
            return config
        if not hasattr(os, "memfd_create"):
            return config
        self._claims = os.memfd_create("tandem-cores")
        return replace(config, cores=CoresConfig(claims=Path(f"/proc/{os.getpid()}/fd/{self._claims}")))

    async def _spawn(self, child: _Child) -> None:
        child.starts.append(time.monotonic())
        child.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "deploy.process", child.role),  # -P: nothing of the user's folder
            *("--worker-id", child.worker_id),
            *("--log-level", self._log_level),
            stdin=PIPE,
            stdout=PIPE,
        )
        self._tell(child, self._settings.to_json())

    @staticmethod
    def _tell(child: _Child, line: str) -> None:
        assert child.process is not None
        assert child.process.stdin is not None
        child.process.stdin.write(f"{line}\n".encode())

    async def _facts(self, child: _Child) -> dict[str, Any]:
        """The line in which a process says that it is there; raises if it says instead why it cannot be."""
        assert child.process is not None
        assert child.process.stdout is not None
        line = await child.process.stdout.readline()
        facts = dict(json.loads(line)) if line else {}
        if not facts:
            raise ConfigError(f"the {child.role} process did not start; its reason is above")
        if "error" in facts:
            raise ConfigError(str(facts["error"]))
        return facts

    async def while_healthy(self, awaited: Coroutine[Any, Any, T]) -> T:
        """Wait for something, unless the service fails first: then raise why."""
        task = asyncio.create_task(awaited)
        waiting: set[asyncio.Future[Any]] = {task, self._failed}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                raise self._failed.result()
            return await task
        finally:
            task.cancel()

    async def _until_ready(self) -> None:
        async with InternalPlane.of(self.config).client(self.internal_address) as client:
            await self.while_healthy(client.wait_until_serving(READY_S))

    async def _watch(self, child: _Child) -> None:
        """Start a worker again when it dies, unless it dies all the time."""
        while True:
            assert child.process is not None
            code = await child.process.wait()
            if self._stopping:
                return
            while child.starts and time.monotonic() - child.starts[0] > RESTART_WINDOW_S:
                child.starts.popleft()
            if code == EXIT_CONFIG:
                self._fail(await self._refusal(child))
                return
            if len(child.starts) > MAX_RESTARTS:
                reason = f"{child.worker_id} cannot run (exit code {code}); its reason is above"
                self._fail(ConfigError(reason))
                return
            self._on_event(f"{child.worker_id} ended with exit code {code}; starting it again")
            await self._spawn(child)
            self._tell(child, self.internal_address)

    async def _refusal(self, child: _Child) -> TandemError:
        try:
            await self._facts(child)
        except ConfigError as error:
            return error
        return ConfigError(f"the {child.role} process refused its settings; its reason is above")

    async def _watch_router(self) -> None:
        assert self._router.process is not None
        code = await self._router.process.wait()
        if not self._stopping:
            reason = f"the router ended with exit code {code}; start the service again"
            self._fail(Unavailable("DRAINING", reason))

    def _fail(self, error: TandemError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)

    @staticmethod
    async def _end(child: _Child) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        send(process, signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            send(process, signal.SIGKILL)
            await process.wait()
