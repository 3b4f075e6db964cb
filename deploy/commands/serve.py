"""`tandem serve`: the service in the foreground, as a process tree or on Ray."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from deploy.commands.show import show_timings, stream_text
from deploy.embedded import EmbeddedService
from deploy.profile import summaries
from tandem.client import TandemClient
from tandem.config import ClusterConfig
from tandem.errors import ConfigError
from tandem.log import known_level
from tandem.sampling import SamplingParams
from tandem.security import check_security

if TYPE_CHECKING:
    from deploy.cluster.service import RayService

    Service = EmbeddedService | RayService

BF16_ISA = "avx512bf16"  # whose processors multiply bfloat16 twice as fast as floats
TRY_PROMPT = "def fibonacci(n):"
TRY_TOKENS = 64


def run(
    config: ClusterConfig,
    num_prefill: int,
    num_decode: int,
    try_prompt: bool,
    log_level: str,
    as_json: bool,
    on_ray: bool = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises `ConfigError` if the service cannot start."""
    if try_prompt and (config.security.api_key_file or config.security.tls_cert):
        raise ConfigError("--try calls without token and TLS; leave it out, and call with tandem generate")
    check_security(config.router.host, config.security)
    known_level(log_level)
    asyncio.run(_serve(config, num_prefill, num_decode, try_prompt, log_level, as_json, on_ray))


async def _serve(
    config: ClusterConfig,
    num_prefill: int,
    num_decode: int,
    try_prompt: bool,
    log_level: str,
    as_json: bool,
    on_ray: bool,
) -> None:
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    leave = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, leave.set)
    began_s, began_epoch_s = time.monotonic(), time.time()
    err.print(f"starting [bold]{config.model.served_name}[/]: router + store, prefill, decode …")
    start = _ray_service if on_ray else partial(_embedded_service, err=err)
    async with start(config, num_prefill, num_decode, log_level) as service:
        say_serving(service, time.monotonic() - began_s, err)
        if as_json:
            print(json.dumps(_facts(service)), flush=True)
        if try_prompt:
            await _try(service.address, err)
        _say_next(service, err)
        await service.while_healthy(leave.wait())
        err.print("finishing what runs, then leaving …")
    if config.profile.dir is not None:
        _show_profiles(config.profile.dir, began_epoch_s, err)


def _show_profiles(folder: Path, since_s: float, err: Console) -> None:
    for text in summaries(folder, since_s):
        err.print(f"\n{text.rstrip()}", markup=False)
    err.print(f"\ntraces for https://ui.perfetto.dev, and these tables, are in {folder}")


def _embedded_service(
    config: ClusterConfig, num_prefill: int, num_decode: int, log_level: str, err: Console
) -> EmbeddedService:
    return EmbeddedService(
        config, num_prefill, num_decode, log_level, on_event=lambda text: err.print(f"[yellow]{text}[/]")
    )


def _ray_service(config: ClusterConfig, num_prefill: int, num_decode: int, log_level: str) -> RayService:
    try:
        from deploy.cluster.service import RayService
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--ray needs Ray ({error.name} is not installed); run pip install 'tandem-serve[ray]'"
        ) from error
    return RayService(config, num_prefill, num_decode, log_level)


async def _try(address: str, err: Console) -> None:
    """One prompt through the whole path, so that a newcomer sees it work."""
    err.print("\none prompt through the whole path:\n")
    async with TandemClient(address) as client:
        finished = await stream_text(
            client, TRY_PROMPT, sys.stdout, sampling=SamplingParams(max_tokens=TRY_TOKENS)
        )
    err.print()
    show_timings(finished, err)


def _facts(service: Service) -> dict[str, Any]:
    return {
        "address": service.address,
        "http_address": service.http_address or None,
        "internal_address": getattr(service, "internal_address", None),
        "model": service.config.model.served_name,
        "kernels": getattr(service, "kernels", None),
    }


def say_serving(service: Service, took_s: float, err: Console) -> None:
    """Where it listens, what computes, and what would compute faster here."""
    err.print(f"serving on [bold]{service.address}[/] (gRPC), ready in {took_s:.1f} s")
    if service.http_address:
        err.print(f"       and [bold]{service.base_url}[/] (OpenAI API)")
    found = getattr(service, "kernels", {})
    for worker, kernels in found.items():
        err.print(f"[dim]{worker}: {kernels}[/]")
    multiplies_bf16 = any(f"kernels for {BF16_ISA}" in kernels for kernels in found.values())
    if multiplies_bf16 and service.config.model.quantization == "none":
        err.print("[dim]--quantization bf16 would use this processor's products of bfloat16[/]")


def _say_next(service: Service, err: Console) -> None:
    if service.config.security.api_key_file or service.config.security.tls_cert:
        err.print("\ncallers need what --api-key-file and the --tls options name")
    else:
        _say_commands(service, err)
    err.print("Ctrl-C stops the service.")


def _say_commands(service: Service, err: Console) -> None:
    tandem, address = _tandem(), service.address
    err.print("\ntry next, in another terminal:")
    err.print(f'  {tandem} generate "import os" --server {address}')
    err.print(f'  {tandem} generate "class Stack:" --server {address} --temperature 0.8 --json')
    if service.http_address:
        err.print(
            f"  curl {service.base_url}/completions -H 'content-type: application/json' "
            '-d \'{"prompt": "import os"}\'',
            markup=False,
        )
    if internal := getattr(service, "internal_address", None):
        err.print(f"  {tandem} audit {internal}")
    err.print(f"  {tandem} plan --memory 8GiB")


def _tandem() -> str:
    """What to type in this folder: the command's name, or its path where it is not on the search path."""
    return "tandem" if shutil.which("tandem") else os.path.relpath(Path(sys.executable).with_name("tandem"))
