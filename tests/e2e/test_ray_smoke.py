"""`tandem serve --ray` from nothing on one machine. The rest of Ray's tests is a tier of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.cluster.service import RAY_SETTINGS
from deploy.local import LocalCluster
from deploy.settings import load_config
from tandem.client import TandemClient
from tandem.sampling import SamplingParams
from tests.e2e.harness import Result

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]

FIRST_TOKEN_S = 60.0
PROMPTS = ["def fibonacci(n):", "import os\n", "class Stack:\n    def push(self, item):"]
OPERATOR_SAYS = ("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "2000")  # and not ours
GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)


async def collect(address: str, prompt: str) -> Result:
    result = Result()
    async with TandemClient(address) as client:
        async for event in client.stream(prompt, GREEDY, timeout_s=60):
            result.take(event)
    return result


@asynccontextmanager
async def serving_on_ray():
    """What a service of two prefill and two decode replicas says of itself, and its process id."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.cli", "serve", "--ray", "--prefill", "2", "--decode", "2"),
        *("--port", "0", "--http-port", "0", "--json"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "RAY_ADDRESS": "local", OPERATOR_SAYS[0]: OPERATOR_SAYS[1]},
    )
    try:
        async with asyncio.timeout(180):
            facts = json.loads(await process.stdout.readline())
            yield facts, process.pid
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 60)
    assert process.returncode == 0


def environment_of_raylet(pid: int) -> dict[str, str]:
    """Of the one that this process has started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    (raylet,) = [
        child
        for found in children
        for child in found.read_text().split()
        if Path(f"/proc/{child}/comm").read_text().strip() == "raylet"
    ]
    entries = Path(f"/proc/{raylet}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


async def test_from_nothing_to_the_tokens_of_the_embedded_mode():
    began_s = time.monotonic()
    async with serving_on_ray() as (facts, pid):
        first = await collect(facts["address"], PROMPTS[0])
        took_s = time.monotonic() - began_s
        environment = environment_of_raylet(pid)
        found = [first, *await asyncio.gather(*(collect(facts["address"], p) for p in PROMPTS[1:]))]

    async with LocalCluster(load_config(None)) as embedded:
        wanted = [await collect(embedded.address, prompt) for prompt in PROMPTS]
    assert [(r.token_ids, r.text) for r in found] == [(r.token_ids, r.text) for r in wanted]
    assert took_s <= FIRST_TOKEN_S
    settings = RAY_SETTINGS | dict([OPERATOR_SAYS])
    assert {name: environment.get(name) for name in settings} == settings
