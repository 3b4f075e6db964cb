"""The service on Ray, run in the foreground: what `tandem serve --ray` starts, and what it takes down again.

It joins the Ray cluster that RAY_ADDRESS or `ray start` on this machine names; without one it starts a
cluster of this machine only, for as long as it runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deploy.cluster.application import APP, build
from deploy.cluster.args import AppArgs
from tandem.config import ClusterConfig
from tandem.errors import ConfigError, Unavailable
from tandem.internal import InternalPlane

READY_S = 300.0
FAILED = "DEPLOY_FAILED"
# Of a cluster that is started here, where the environment does not say otherwise. With Ray's own intervals
# its processes and Serve's loops take a sixth of a core while nothing happens.
RAY_SETTINGS = {
    "RAY_worker_niceness": "0",  # Ray's 15 loses to whatever else the machine does
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # a dead replica is noticed that much later, at most
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_task_events_report_interval_ms": "0",  # never: only a dashboard shows them
    "RAY_event_stats": "0",
}

T = TypeVar("T")


class RayService:
    """`async with RayService(config) as service` serves at `service.address` until the block ends."""

    def __init__(
        self, config: ClusterConfig, num_prefill: int = 1, num_decode: int = 1, log_level: str = "WARNING"
    ) -> None:
        self.config = config
        self.address = ""
        self.http_address = ""  # of the OpenAI API, where the settings ask for it
        self.internal_address = ""
        port = config.router.port
        self._args = AppArgs(
            prefill=num_prefill, decode=num_decode, internal_port=port and port + 1, log_level=log_level
        )

    @property
    def base_url(self) -> str:
        """What OpenAI's clients want to know."""
        return f"{'https' if self.config.security.tls_cert else 'http'}://{self.http_address}/v1"

    async def __aenter__(self) -> Self:
        """Deploy everything and wait until it serves. Raises `ConfigError` or `Unavailable`."""
        application = build(self.config, self._args)
        try:
            async with asyncio.timeout(READY_S):
                handle = await asyncio.to_thread(_deploy, application)
                _take_signals_back()
                addresses = await handle.addresses.remote()
                self.address, self.http_address = addresses["public"], addresses["http"]
                self.internal_address = addresses["internal"]
                async with InternalPlane.of(self.config).client(self.internal_address) as client:
                    await client.wait_until_serving(READY_S)
        except BaseException as error:
            what = await asyncio.to_thread(_what_is_wrong)
            await self.__aexit__(None, None, None)
            if isinstance(error, TimeoutError):
                raise Unavailable("NO_DECODE", f"not ready within {READY_S:g} s: {what}") from None
            if isinstance(error, RuntimeError):
                raise ConfigError(what or str(error)) from error
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The router drains first, then the workers leave; then our own cluster, if it is ours."""
        await asyncio.to_thread(_remove)

    async def while_healthy(self, awaited: Coroutine[Any, Any, T]) -> T:
        """Wait for something. Serve replaces what fails meanwhile."""
        return await awaited


def _deploy(application: serve.Application) -> DeploymentHandle[Any]:
    """Blocks until every replica runs. Raises `RuntimeError` if one cannot."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    return serve.run(application, name=APP, route_prefix=None)


def _take_signals_back() -> None:
    """Ray answers SIGTERM by ending the process at once; whoever had the signals before gets them again."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.getsignal(number))


def _remove() -> None:
    if ray.is_initialized():
        serve.delete(APP)
        ray.shutdown()


def _what_is_wrong() -> str:
    """What Serve says of the deployments that are not well, in one line each."""
    application = serve.status().applications.get(APP) if ray.is_initialized() else None
    if application is None:
        return ""
    sick = {name: d.message for name, d in application.deployments.items() if d.message}
    return "; ".join(f"{name}: {_reason(message)}" for name, message in sick.items()) or application.message


def _reason(message: str) -> str:
    """The last line of a traceback that names one of our errors; the whole message without one."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.split("ConfigError: ", 1)[1] for line in lines if "ConfigError: " in line]
    return errors[-1] if errors else " ".join(lines)
