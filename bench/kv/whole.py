"""What a store's backend does to whole requests: an embedded service for each URL, all of them in turns.

    tandem bench kv --whole 111m [--backend memory:// --backend shm://]

A short prompt, a long one, and eight of both at once, with other tokens in every round and nothing cached.
Ratios are to the first URL, within rounds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from bench.embedded import serving
from bench.measure import Sheet, Spread, console, flat, interleave, machine, table, write_csv, write_json
from bench.shapes import checkpoint
from tandem.client import TandemClient
from tandem.geometry import ModelGeometry
from tandem.redis_url import redacted
from tandem.sampling import SamplingParams

BACKENDS = ("memory://", "shm://")
LOADS: dict[str, tuple[int, ...]] = {  # tokens of the prompts that come at once
    "128 tokens": (128,),
    "1,000 tokens": (1000,),
    "eight of both": (128, 1000) * 4,
}
OUTPUT_TOKENS = 16
SAMPLING = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
THREADS = 2  # one of each worker


@dataclass(frozen=True, slots=True)
class Seen:
    """By a client, in milliseconds: medians of the requests, and the time until the last has ended."""

    ttft_ms: float
    second_ms: float  # from the first token to the second
    whole_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """One backend under one load."""

    backend: str
    load: str
    ttft_ms: Spread
    second_ms: Spread
    whole_ms: Spread
    ttft_ratio: Spread  # to the first backend
    whole_ratio: Spread


def run(backends: Sequence[str], shape: str, rounds: int, out: Path, as_json: bool) -> dict[str, Any]:
    """Measure, show, write; returns the document. Raises `ConfigError`."""
    rows = measure(backends or BACKENDS, shape, rounds)
    shown = console(as_json)
    shown.print(table(*sheet(shape, rows)))
    document = {"machine": machine(THREADS), "shape": shape, "rows": [asdict(row) for row in rows]}
    write_json(out / "whole.json", document)
    write_csv(out / "whole.csv", [flat(row) for row in rows])
    shown.print(f"\nwhole.json and whole.csv are in {out}")
    return document


def measure(backends: Sequence[str], shape: str, rounds: int) -> list[Row]:
    """All loads on each backend, round by round. Raises `ConfigError` for an unknown shape or backend."""
    path = checkpoint(shape)
    settings = {"model": {"path": str(path), "name": shape}, "speculation": {"draft": "none"}}
    vocab_size = ModelGeometry.from_path(path).vocab_size
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        arms = {}
        for url in backends:
            address = stack.enter_context(serving({**settings, "kvstore": {"url": url}}))
            arms[url] = partial(_all_loads, runner, address, random.Random(7), vocab_size)
        return rows_of(interleave(arms, rounds))


def rows_of(found: Mapping[str, Sequence[Mapping[str, Seen]]]) -> list[Row]:
    """From each backend's rounds."""
    first = next(iter(found.values()))
    rows = []
    for load in first[0]:
        yardstick = [one[load] for one in first]
        for url, rounds in found.items():
            seen = [one[load] for one in rounds]
            ratios = (
                Spread.of_ratios((getattr(a, name) for a in seen), (getattr(b, name) for b in yardstick))
                for name in ("ttft_ms", "whole_ms")
            )
            spreads = (Spread.of(getattr(one, name) for one in seen) for name in Seen.__slots__)
            rows.append(Row(redacted(url), load, *spreads, *ratios))
    return rows


def _all_loads(runner: asyncio.Runner, address: str, rng: random.Random, vocab_size: int) -> dict[str, Seen]:
    drawn = {
        load: [rng.choices(range(3, vocab_size), k=n) for n in lengths] for load, lengths in LOADS.items()
    }
    return {load: runner.run(_burst(address, prompts)) for load, prompts in drawn.items()}


async def _burst(address: str, prompts: Sequence[Sequence[int]]) -> Seen:
    async with TandemClient(address) as client:
        began_s = perf_counter()
        arrivals = await asyncio.gather(*(_stream(client, prompt) for prompt in prompts))
    return Seen(
        ttft_ms=1e3 * median(times[0] - began_s for times in arrivals),
        second_ms=1e3 * median(times[1] - times[0] for times in arrivals),
        whole_ms=1e3 * (max(times[-1] for times in arrivals) - began_s),
    )


async def _stream(client: TandemClient, prompt: Sequence[int]) -> list[float]:
    """When each message with tokens came."""
    events = client.stream(prompt, SAMPLING)
    return [perf_counter() async for event in events if event.HasField("token_chunk")]


def sheet(shape: str, rows: Sequence[Row]) -> Sheet:
    """Medians over the rounds, and the range of the ratios."""
    cells = [
        (
            *(row.load, row.backend),
            *(f"{spread.median:.0f}" for spread in (row.ttft_ms, row.second_ms, row.whole_ms)),
            *(
                f"{ratio.median:.2f} ({ratio.low:.2f} – {ratio.high:.2f})"
                for ratio in (row.ttft_ratio, row.whole_ratio)
            ),
        )
        for row in rows
    ]
    title = f"{shape} model, {OUTPUT_TOKENS} tokens out, milliseconds; ratios to the first backend"
    columns = ("prompts", "KV in", "first token", "second after", "whole", "first token", "whole")
    return Sheet(title, columns, cells, 2)
