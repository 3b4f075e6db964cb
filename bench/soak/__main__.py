"""Many short requests of every kind through one embedded service: memory, decode step, books.

    python -m bench.soak [--requests 10000] [--out DIR]

After the last request the decode step is compared, in turns, with that of a service that has just started.
Exits with 1 if a process grows by 1 MiB per 1,000 requests or more, if the step is more than 5 % above the
fresh one's, if anything is still owned at the end, or a request failed that should not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.embedded import Embedded, started
from bench.measure import Meter, Spread, console, machine, table, write_csv, write_json
from bench.soak import watch
from bench.soak.load import Load
from bench.soak.verdict import MIB, Sample, Verdict, judge
from tandem.client import TandemClient

SAMPLES = 20
THREADS = 2  # one for each worker
FRESH_REQUESTS = 140  # of every kind, for the service that has just started: what is lazy has been done
POOL_BYTES = 64 * MIB  # small, so that all of a pool has been written to before memory is judged
SETTINGS = {"cache": dict.fromkeys(("prefill_bytes", "decode_bytes", "store_bytes"), POOL_BYTES)}


async def soak(
    service: Embedded, requests: int, out: Path, meter: Meter
) -> tuple[list[Sample], Load, list[str]]:
    """Samples along the way, what became of the requests, and what is still owned after the last.

    `soak.csv` has what is known so far, should nobody want to wait for the end.
    """
    pids = watch.processes(service.pid)
    every = max(requests // SAMPLES, 1)
    samples: list[Sample] = []
    async with TandemClient(service.address) as client:
        load = Load(client)
        for first in range(0, requests, every):
            last = min(first + every, requests)
            meter.say(f"{first} of {requests} requests")
            await load.run(range(first, last))
            rss = {name: watch.resident_bytes(pid) for name, pid in pids.items()}
            samples.append(Sample(last, rss, await watch.decode_step_s(client)))
            write_csv(out / "soak.csv", [_row(sample) for sample in samples])
            meter.step()
    owned = await watch.still_owned(service.internal_address)
    if watch.processes(service.pid) != pids:
        load.failures.append("a worker died and was started again")
    return samples, load, owned


async def steps_beside_fresh(tired: Embedded, fresh: Embedded) -> Spread:
    """`watch.steps_in_turns` of a service after its load and of one that had little."""
    async with TandemClient(tired.address) as long_used, TandemClient(fresh.address) as other:
        await Load(other).run(range(FRESH_REQUESTS))
        return await watch.steps_in_turns(long_used, other)


def run(requests: int, out: Path, settings: Mapping[str, Any]) -> Verdict:
    """Start, load, look, judge; tables, CSV and JSON."""
    with started(settings) as service, Meter("soak", -(-requests // max(requests // SAMPLES, 1))) as meter:
        samples, load, owned = asyncio.run(soak(service, requests, out, meter))
        with started(settings) as fresh:
            ratio = asyncio.run(steps_beside_fresh(service, fresh))
    verdict = judge(samples, ratio, owned, load.failures)
    rows = [_row(sample) for sample in samples]
    outcomes = [
        {"kind": kind, "outcome": outcome, "requests": count}
        for (kind, outcome), count in sorted(load.outcomes.items())
    ]
    content = {"machine": machine(THREADS), "samples": rows, "outcomes": outcomes}
    write_json(out / "soak.json", content | asdict(verdict) | {"is_flat": verdict.is_flat})
    _show(rows, outcomes, verdict)
    return verdict


def _row(sample: Sample) -> dict[str, Any]:
    memory = {f"{name}_mib": round(size / MIB, 2) for name, size in sample.rss.items()}
    return {"requests": sample.requests, "step_ms": round(1e3 * sample.step_s, 4)} | memory


def _show(rows: Sequence[dict[str, Any]], outcomes: Sequence[dict[str, Any]], verdict: Verdict) -> None:
    shown = console(as_json=False)
    for title, some, left in (("samples", rows, 0), ("requests", outcomes, 2)):
        shown.print(table(title, list(some[0]), ([str(v) for v in row.values()] for row in some), left))
    for name, slope in verdict.mib_per_1000.items():
        shown.print(f"{name}: {slope:+.3f} MiB per 1,000 requests")
    ratio = verdict.step_ratio
    steps = f"{ratio.median:.3f} ({ratio.low:.2f} to {ratio.high:.2f})"
    shown.print(f"decode step, over that of a service that has just started, in turns: {steps}")
    for what, lines in (("still owned", verdict.owned), ("failed", verdict.failures)):
        shown.print(f"{what}: {'; '.join(lines) or 'nothing'}")
    shown.print("flat" if verdict.is_flat else "NOT flat")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="at least 20")
    parser.add_argument("--out", type=Path, default=Path("bench-results/soak"))
    options = parser.parse_args()
    if options.requests < SAMPLES:
        parser.error(f"--requests must be {SAMPLES} or more")
    sys.exit(0 if run(options.requests, options.out, SETTINGS).is_flat else 1)


if __name__ == "__main__":
    main()
