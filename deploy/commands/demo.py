"""`tandem demo`: eight prompts at once through the whole path, then stop."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.commands.show import STAGES, as_json
from deploy.embedded import EmbeddedService
from tandem.audit import fetch_audit
from tandem.client import TandemClient
from tandem.config import ClusterConfig
from tandem.internal import InternalPlane
from tandem.sampling import SamplingParams

PROMPTS = (
    "def fibonacci(n):",
    "import os\n\ndef read_lines(path):",
    "class Stack:\n    def __init__(self):",
    "for i in range(",
    "def is_prime(number):\n    ",
    "try:\n    import json",
    "def main():\n    parser = argparse.ArgumentParser(",
    'class Node:\n    """A node of a linked list."""\n',
)
TOKENS = 48


def run(config: ClusterConfig, as_json_lines: bool) -> int:
    """Returns the exit code: 0 if all eight were answered and nothing leaked."""
    return asyncio.run(_run(config, as_json_lines))


async def _run(config: ClusterConfig, as_json_lines: bool) -> int:
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    began_s = time.monotonic()
    async with EmbeddedService(config) as service, TandemClient(service.address) as client:
        err.print(
            f"service ready in {time.monotonic() - began_s:.1f} s; sending {len(PROMPTS)} prompts at once"
        )
        began_s = time.monotonic()
        sampling = SamplingParams(max_tokens=TOKENS)
        responses = await asyncio.gather(*(client.generate(prompt, sampling) for prompt in PROMPTS))
        took_s = time.monotonic() - began_s
        completions = [response.completions[0] for response in responses]
        records = [as_json(c.text, c.token_ids, c.finished) for c in completions]
        leaked = await _leaked(service.internal_address, InternalPlane.of(service.config))
    if as_json_lines:
        for record in records:
            print(json.dumps(record))
    else:
        _show(records)
    num_tokens = sum(record["usage"]["completion"] for record in records)
    err.print(f"{num_tokens} tokens in {took_s:.1f} s; units still owned in any pool: {leaked}")
    return 0 if leaked == 0 else 1


async def _leaked(internal_address: str, plane: InternalPlane) -> int:
    """Units still owned by the router's credits and the store when nothing runs."""
    internal = plane.channel(internal_address)
    try:
        async with asyncio.timeout(5.0):
            while sum(audit.owned for audit in await fetch_audit(internal)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # a release may still travel over the wire
            return 0
    except TimeoutError:
        return sum(audit.owned for audit in await fetch_audit(internal))
    finally:
        await internal.close()


def _show(records: list[dict[str, Any]]) -> None:
    out = Console(highlight=False, soft_wrap=True)
    for prompt, record in zip(PROMPTS, records, strict=True):
        out.rule(style="dim")
        out.print(f"[bold]{prompt}[/]", end="", markup=True)
        out.print(record["text"], markup=False)
    out.rule(style="dim")
    table = Table(title="where the time went, ms", title_justify="left", box=None, pad_edge=False)
    table.add_column("prompt", no_wrap=True)
    for name, _, _ in (*STAGES, ("total", "", "")):
        table.add_column(name, justify="right")
    for prompt, record in zip(PROMPTS, records, strict=True):
        timings = record["timings"]
        cells = [f"{timings[field]:.0f}" for _, field, _ in STAGES]
        table.add_row(prompt.splitlines()[0][:20], *cells, f"{timings['total_ms']:.0f}")
    out.print(table)
