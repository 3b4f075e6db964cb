"""What the service costs around its engine: `tandem bench overhead`.

The same prompts by the engine's bare loop (bench/speculation/rig.py: steps, stops and text, one process) and
through the whole embedded service (gRPC, router, store, both workers), in turns, plain decoding. Both compute
with as many threads as there are cores. The service's tokens are counted where a streaming client gets them,
while all sequences run: from the last one's first token until the first one's last. The client and the
router have no cores of their own. Beside the rate stands what a client sees: the time to its first token,
and the gaps between messages, which hold several tokens where steps are faster than messages are worth.
The model is the bundled one, or that grown to a larger one's cost: what a token costs around the engine does
not grow with it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from bench.embedded import serving
from bench.inflate import BUNDLED, Pair, inflated_pair
from bench.measure import Sheet, Spread, console, flat, interleave, machine, table, write_csv, write_json
from bench.speculation import text
from bench.speculation.rig import Rig, Setup
from tandem.client import TandemClient
from tandem.sampling import SamplingParams

BATCHES = (1, 4, 8)
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 512
SAMPLING = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
Arrivals = list[tuple[float, int]]  # when a message with tokens of one sequence came, and how many


@dataclass(frozen=True, slots=True)
class Seen:
    """By the clients of one run. Milliseconds."""

    tokens_per_s: float
    ttft_ms: float  # median of the sequences
    gap_ms: float  # between messages of one sequence, median of all
    gap_p99_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """One batch size: tokens per second, service over engine within rounds, and what clients see."""

    batch: int
    engine: Spread
    service: Spread
    ratio: Spread
    ttft_ms: Spread
    gap_ms: Spread
    gap_p99_ms: Spread

    @classmethod
    def of(cls, batch: int, engine: list[float], seen: list[Seen]) -> Row:
        """Of rounds: the engine's tokens per second, and what clients of the service saw."""
        service = [one.tokens_per_s for one in seen]
        return cls(
            *(batch, Spread.of(engine), Spread.of(service), Spread.of_ratios(service, engine)),
            *(Spread.of(getattr(one, name) for one in seen) for name in ("ttft_ms", "gap_ms", "gap_p99_ms")),
        )


def run(shape: str, rounds: int, out: Path, as_json: bool) -> dict[str, Any]:
    """Measure, show, write; returns the document. Raises `ConfigError` for an unknown shape."""
    shown = console(as_json)
    rows = measure(BUNDLED if shape == "raw" else inflated_pair(shape), rounds)
    shown.print(table(*sheet(shape, rows)))
    document = {"machine": machine(_num_cores()), "shape": shape, "rows": [asdict(row) for row in rows]}
    write_json(out / "overhead.json", document)
    write_csv(out / "overhead.csv", [flat(row) for row in rows])
    shown.print(f"\noverhead.json and overhead.csv are in {out}")
    return document


def measure(pair: Pair, rounds: int) -> list[Row]:
    """Engine and service in turns, for each number of sequences."""
    most = max(BATCHES)
    rig = Rig(pair, Setup(draft="none"), most, PROMPT_TOKENS + OUTPUT_TOKENS, _num_cores())
    prompts = text.prompts(text.held_out(BUNDLED.target), most, PROMPT_TOKENS)
    rig.prefill(prompts)
    settings = {"model": {"path": str(pair.target)}, "speculation": {"draft": "none"}}
    with serving(settings) as address, asyncio.Runner() as runner:
        rows = []
        for batch in BATCHES:
            some, seen = prompts[:batch], list[Seen]()
            arms = {
                "engine": partial(_engine, rig, some),
                "service": partial(_service, runner, address, some, seen),
            }
            rates = interleave(arms, rounds)
            rows.append(Row.of(batch, rates["engine"], seen[-rounds:]))
        return rows


def steady_rate(sequences: Sequence[Arrivals]) -> float:
    """Tokens per second while all sequences run; 0 where they never do."""
    began = max(arrivals[0][0] for arrivals in sequences)
    ended = min(arrivals[-1][0] for arrivals in sequences)
    if ended <= began:
        return 0.0
    tokens = sum(count for arrivals in sequences for when, count in arrivals if began < when <= ended)
    return tokens / (ended - began)


def gaps_ms(sequences: Sequence[Arrivals]) -> list[float]:
    """Between messages of each sequence, from the shortest."""
    times = ([when for when, _ in arrivals] for arrivals in sequences)
    return sorted(1e3 * (later - before) for one in times for before, later in pairwise(one))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _engine(rig: Rig, prompts: Sequence[text.Tokens]) -> float:
    return rig.run(rig.plain, prompts, len(prompts), SAMPLING).tokens_per_s


def _service(runner: asyncio.Runner, address: str, prompts: Sequence[text.Tokens], seen: list[Seen]) -> float:
    seen.append(runner.run(_streams(address, prompts)))
    return seen[-1].tokens_per_s


async def _streams(address: str, prompts: Sequence[text.Tokens]) -> Seen:
    async with TandemClient(address) as client:
        began_s = perf_counter()
        sequences = await asyncio.gather(*(_stream(client, prompt) for prompt in prompts))
    ttft_ms = median(1e3 * (arrivals[0][0] - began_s) for arrivals in sequences)
    gaps = gaps_ms(sequences)
    return Seen(steady_rate(sequences), ttft_ms, median(gaps), gaps[int(0.99 * len(gaps))])


async def _stream(client: TandemClient, prompt: text.Tokens) -> Arrivals:
    events = client.stream(prompt, SAMPLING)
    return [
        (perf_counter(), len(event.token_chunk.token_ids))
        async for event in events
        if event.HasField("token_chunk")
    ]


def sheet(shape: str, rows: Sequence[Row]) -> Sheet:
    """Medians over the rounds, and the range of the ratio."""
    cells = [
        (
            str(row.batch),
            *(f"{row.engine.median:.0f}", f"{row.service.median:.0f}"),
            f"{row.ratio.median:.2f}",
            f"{row.ratio.low:.2f} – {row.ratio.high:.2f}",
            f"{row.ttft_ms.median:.0f}",
            f"{row.gap_ms.median:.1f}, {row.gap_p99_ms.median:.1f}",
        )
        for row in rows
    ]
    title = f"tokens/s, {PROMPT_TOKENS} in, {OUTPUT_TOKENS} out, {shape} model, plain decoding"
    seen = ("TTFT, ms", "gaps, ms: p50, p99")
    return Sheet(title, ("sequences", "engine", "service", "service / engine", "range", *seen), cells, 1)
