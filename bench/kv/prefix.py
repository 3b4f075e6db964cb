"""Time to first token of prompts whose beginning is cached, against the same service without a hit."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Spread
from tandem.client import TandemClient
from tandem.errors import ConfigError
from tandem.sampling import SamplingParams

CACHED_TOKENS, OWN_TOKENS = 1024, 8
PREFIX_BYTES = 256 << 20
SETTLE_S = 0.5  # publishing goes on after the answer


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Milliseconds to the first token, and how many times faster a hit is, within rounds."""

    cold_ms: Spread
    hit_ms: Spread
    speedup: Spread


def measure(url: str, rounds: int) -> PrefixHit:
    """The bundled model: each round sends a new beginning, then another prompt that begins with it."""
    with _serving(url) as address:
        return asyncio.run(_measure(address, rounds))


@contextmanager
def _serving(url: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"  # which is YAML too
        values = {"kvstore": {"url": url}, "cache": {"prefix_bytes": PREFIX_BYTES}}
        settings.write_text(json.dumps(values))
        command = [sys.executable, "-m", "deploy.cli", "serve", "--port", "0", "--http-port", "0", "--json"]
        process = subprocess.Popen([*command, "--config", str(settings)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise ConfigError("the service did not start; its reason is above")
            yield json.loads(line)["address"]
        finally:
            process.terminate()
            process.wait()


async def _measure(address: str, rounds: int) -> PrefixHit:
    rng, cold, hits = random.Random(0), [], []
    async with TandemClient(address) as client:
        for number in range(rounds + 1):  # the first is a warm-up
            ids = [rng.randrange(3, 1000) for _ in range(CACHED_TOKENS)]
            pair = []
            for own in (1, 2):
                pair.append(await _ttft_ms(client, [*ids, *([own] * OWN_TOKENS)]))
                await asyncio.sleep(SETTLE_S)
            if number:
                cold.append(pair[0])
                hits.append(pair[1])
    return PrefixHit(Spread.of(cold), Spread.of(hits), Spread.of_ratios(cold, hits))


async def _ttft_ms(client: TandemClient, prompt: list[int]) -> float:
    began_s, first_s = time.perf_counter(), 0.0
    async for event in client.stream(prompt, SamplingParams(max_tokens=2, ignore_eos=True)):
        if not first_s and event.WhichOneof("event") == "token_chunk":
            first_s = time.perf_counter()
    return 1e3 * (first_s - began_s)
