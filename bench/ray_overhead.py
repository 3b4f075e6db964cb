"""What Ray costs: the service on Ray against the embedded one, the same workers in the same run.

    python -m bench.ray_overhead [--shape raw|111m] [--rounds 5] [--out bench-results/ray] [--json]

Each arm starts its service, warms it up, measures and stops it, so that neither runs beside the other: what
Ray's own processes use is part of what Ray costs. Two figures: output tokens per second of eight streams at
once, and time to first token of a lone request, from the call to the first chunk (TTFT, send-relative).
Workers share the machine's cores in both, by the same setting (`cores.claims`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.measure import Meter, Spread, console, flat, interleave, machine, table, write_csv, write_json
from bench.service import OUTPUT_TOKENS, PROMPT_TOKENS, complete, prompts_of, serving
from bench.shapes import checkpoint
from tandem.client import TandemClient
from tandem.sampling import SamplingParams

STREAMS = 8
REPEATS = 5  # of the eight streams, in a round
LONE_REQUESTS = 40  # in a round; p50 of fewer would say little
WARM_UPS = 3
THREADS = 2  # that compute, of both workers together
MODES = {"embedded": (), "ray": ("--ray",)}
LEAST_THROUGHPUT, MOST_ADDED_TTFT_MS = 0.95, 5.0

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Visit:
    """What one start of one service gave."""

    ready_s: float  # from nothing to serving
    tokens_per_s: float  # median over the repeats
    ttft_ms: float  # p50 over the lone requests


@dataclass(frozen=True, slots=True)
class Overhead:
    """Ray against embedded, within rounds."""

    throughput_ratio: Spread  # Ray / embedded
    added_ttft_ms: Spread  # Ray − embedded


async def first_token_ms(client: TandemClient, prompt: Sequence[int]) -> float:
    """From the call to the first chunk of a short request."""
    began_s = time.perf_counter()
    found = None
    async for event in client.stream(prompt, SamplingParams(max_tokens=2, ignore_eos=True)):
        if found is None and event.WhichOneof("event") == "token_chunk":
            found = 1e3 * (time.perf_counter() - began_s)
    assert found is not None
    return found


async def measure(address: str, prompts: Prompts, ready_s: float) -> Visit:
    """Both figures of a service that runs."""
    async with TandemClient(address) as client:
        for prompt in prompts[:WARM_UPS]:
            await first_token_ms(client, prompt)
        await complete(client, prompts)
        rates = [await complete(client, prompts) for _ in range(REPEATS)]
        waits = [await first_token_ms(client, prompts[n % STREAMS]) for n in range(LONE_REQUESTS)]
    return Visit(ready_s, statistics.median(rates), statistics.median(waits))


def visit(path: Path, options: Sequence[str], prompts: Prompts) -> Visit:
    """Start the service, measure it, stop it."""
    began_s = time.perf_counter()
    with serving(path, "none", *options) as address:
        return asyncio.run(measure(address, prompts, time.perf_counter() - began_s))


def overhead(visits: Mapping[str, Sequence[Visit]]) -> Overhead:
    """The two figures that matter, from visits in turns."""
    pairs = list(zip(visits["ray"], visits["embedded"], strict=True))
    return Overhead(
        Spread.of(ray.tokens_per_s / embedded.tokens_per_s for ray, embedded in pairs),
        Spread.of(ray.ttft_ms - embedded.ttft_ms for ray, embedded in pairs),
    )


def run(shape: str, rounds: int, out: Path, as_json: bool) -> dict[str, Any]:
    """Measure, print the table, write CSV and JSON; the document that was written."""
    path = checkpoint(shape)
    prompts = prompts_of(path, STREAMS)
    meter = Meter("embedded and Ray in turns", rounds * len(MODES))
    with TemporaryDirectory(prefix="tandem-") as folder, meter:
        settings = shared_cores(Path(folder))
        arms = {mode: partial(visit, path, (*settings, *options), prompts) for mode, options in MODES.items()}
        visits = interleave(arms, rounds, warm_ups=0, after=meter.step)
    found, shown = overhead(visits), console(as_json)
    shown.print(
        table(
            f"{shape}: {STREAMS} streams of {PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens: median (low…high)",
            ("mode", "ready s", "tokens/s", "TTFT p50 ms"),
            (
                (mode, *(_text(v, name) for name in ("ready_s", "tokens_per_s", "ttft_ms")))
                for mode, v in visits.items()
            ),
        )
    )
    ratio, added = found.throughput_ratio, found.added_ttft_ms
    shown.print(
        f"Ray / embedded {ratio.median:.3f} ({ratio.low:.3f}…{ratio.high:.3f}), goal ≥ {LEAST_THROUGHPUT}; "
        f"added TTFT {added.median:.2f} ms ({added.low:.2f}…{added.high:.2f}), goal ≤ {MOST_ADDED_TTFT_MS:g}"
    )
    rows = [{"mode": mode, **flat(one)} for mode, several in visits.items() for one in several]
    content = {"machine": machine(THREADS), "shape": shape, "rows": rows, **flat(found)}
    write_csv(out / "ray_overhead.csv", rows)
    write_json(out / "ray_overhead.json", content)
    return content


def shared_cores(folder: Path) -> tuple[str, str]:
    """Options that let workers share cores by a file in the folder, whoever starts them."""
    file = folder / "config.yaml"
    file.write_text(json.dumps({"cores": {"claims": str(folder / "claims")}}))
    return "--config", str(file)


def _text(visits: Sequence[Visit], name: str) -> str:
    spread = Spread.of(getattr(one, name) for one in visits)
    return f"{spread.median:.1f} ({spread.low:.1f}…{spread.high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="raw", help="raw: the bundled target; or 111m, 1b: random weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-results/ray"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    content = run(options.shape, options.rounds, options.out, options.json)
    if options.json:
        print(json.dumps(content))


if __name__ == "__main__":
    main()
