"""Time to first token of prompts whose beginning is cached, against the same service without a hit."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from bench.embedded import serving
from bench.measure import Spread
from tandem.client import TandemClient
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
    values = {"kvstore": {"url": url}, "cache": {"prefix_bytes": PREFIX_BYTES}}
    with serving(values) as address:
        return asyncio.run(_measure(address, rounds))


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
