"""Servers of one checkpoint over HTTP. At most one is awake: the others get no processor time.

Ours starts within seconds, so it is started for each trial; vLLM's takes minutes, so it is put to sleep in
between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.embedded import started
from bench.serve.metrics import Slo
from bench.serve.target import HttpTarget
from bench.vllm.peer import Settings
from bench.vllm.server import SERVED_NAME, VLlmServer, starting


@dataclass(frozen=True, slots=True)
class System:
    """One server to compare."""

    awake: Callable[[Slo], AbstractContextManager[HttpTarget]]  # for such limits, until the block ends
    follows_limits: bool = False  # so that it may act otherwise by others


def tandem(path: Path, speculation: Mapping[str, Any], quantization: str = "none") -> System:
    """The embedded service, told the limit of gaps, so that it computes prompts where that keeps to it.

    Else it is as by default but for its weights: both workers share all cores.
    """
    model = {"path": str(path), "name": SERVED_NAME, "quantization": quantization}
    return System(partial(_tandem, {"model": model, "speculation": speculation}), follows_limits=True)


@contextmanager
def _tandem(values: Mapping[str, Any], slo: Slo) -> Iterator[HttpTarget]:
    placed = {"disaggregate": "auto", "itl_limit_s": (slo.itl_ms or 0.0) / 1e3}
    with started({**values, "router": placed}) as service:
        yield HttpTarget(service.http_url, SERVED_NAME, with_ids=True)


def vllm(python: Path, engines: Mapping[str, Settings], stack: ExitStack) -> dict[str, System]:
    """A server for each engine until the stack closes, all asleep. Raises `ConfigError` if one cannot run."""
    servers = {name: stack.enter_context(starting(python, each)) for name, each in engines.items()}
    for server in servers.values():
        server.wait_until_ready()
        server.sleep()
    return {name: System(partial(_awake, server)) for name, server in servers.items()}


@contextmanager
def _awake(server: VLlmServer, _: Slo) -> Iterator[HttpTarget]:
    server.wake()
    try:
        yield HttpTarget(server.url, SERVED_NAME, with_ids=True)
    finally:
        server.sleep()
