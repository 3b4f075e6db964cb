"""`tandem serve`: the embedded service in the foreground."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time

from rich.console import Console

from deploy.commands.show import show_timings, stream_text
from deploy.embedded import EmbeddedService
from tandem.client import TandemClient
from tandem.config import ClusterConfig
from tandem.sampling import SamplingParams
from tandem.security import check_exposure

TRY_PROMPT = "def fibonacci(n):"
TRY_TOKENS = 64


def run(
    config: ClusterConfig, num_prefill: int, num_decode: int, try_prompt: bool, log_level: str, as_json: bool
) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises `ConfigError` if the service cannot start."""
    check_exposure(config.router.host, config.security)
    asyncio.run(_serve(config, num_prefill, num_decode, try_prompt, log_level, as_json))


async def _serve(
    config: ClusterConfig, num_prefill: int, num_decode: int, try_prompt: bool, log_level: str, as_json: bool
) -> None:
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    leave = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, leave.set)
    began_s = time.monotonic()
    err.print(f"starting [bold]{config.model.served_name}[/]: router + store, prefill, decode …")
    service = EmbeddedService(
        config, num_prefill, num_decode, log_level, on_event=lambda text: err.print(f"[yellow]{text}[/]")
    )
    async with service:
        err.print(
            f"serving on [bold]{service.address}[/] (gRPC), ready in {time.monotonic() - began_s:.1f} s"
        )
        if as_json:
            print(json.dumps({"address": service.address, "model": config.model.served_name}), flush=True)
        if try_prompt:
            await _try(service.address, err)
        _say_next(service.address, err)
        await service.while_healthy(leave.wait())
        err.print("finishing what runs, then leaving …")


async def _try(address: str, err: Console) -> None:
    """One prompt through the whole path, so that a newcomer sees it work."""
    err.print("\none prompt through the whole path:\n")
    async with TandemClient(address) as client:
        finished = await stream_text(
            client, TRY_PROMPT, sys.stdout, sampling=SamplingParams(max_tokens=TRY_TOKENS)
        )
    err.print()
    show_timings(finished, err)


def _say_next(address: str, err: Console) -> None:
    err.print("\ntry next, in another terminal:")
    err.print(f'  .venv/bin/tandem generate "import os" --server {address}')
    err.print(f'  .venv/bin/tandem generate "class Stack:" --server {address} --temperature 0.8 --json')
    err.print("  .venv/bin/tandem plan --memory 8GiB")
    err.print("Ctrl-C stops the service.")
