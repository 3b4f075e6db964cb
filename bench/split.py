"""Split against unsplit under a mixed load: `tandem bench split`.

Four services of one model on the same two cores take turns at the same requests: prefill and decode on
workers that share the cores; everything on one worker of two threads, prompts in chunks between steps; the
split whose router, told the limit of gaps, keeps a prompt with its decode worker where that pays; and the one
worker again with prompts in one piece, as it was before chunks were thought of. Most prompts are short, some
are long, arrivals are Poisson. A request is good if its first token and its gaps keep the limits.
A second table (bench/isolation.py) shows how long tokens wait for prompts, and what sharing cores brings.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from bench import isolation
from bench.embedded import models_of, serving
from bench.inflate import BUNDLED, inflated_pair
from bench.measure import Sheet, console, flat, machine, table, write_csv, write_json
from bench.serve.arrivals import Arrival, Schedule
from bench.serve.metrics import Slo
from bench.serve.record import RequestRecord
from bench.serve.session import LoadTest, Model, Options, Run
from bench.serve.target import GrpcTarget
from tandem.quantizations import parse_quantization

ITL_MS = 50.0
LIMITS = Slo(ttft_ms=1000, itl_ms=ITL_MS)
MODES: Mapping[str, Mapping[str, Any]] = {
    "split": {"router": {"disaggregate": "always"}},
    "unsplit": isolation.together(2),
    "auto": {"router": {"disaggregate": "auto", "itl_limit_s": ITL_MS / 1e3}},
}
WITH_WHOLE = {**MODES, "whole": isolation.together(2, **isolation.UNCHUNKED)}
MIXES = {"few long": "mix:96*9,1536", "many long": "mix:96*2,1536"}  # prompt tokens, by weight
OUTPUT_TOKENS = "48"
RATES = (1.0, 3.0, 6.0)  # requests a second
CALM = ("split", "unsplit", "whole")
TIGHT, LOOSE = Slo(ttft_ms=500, itl_ms=25), Slo(ttft_ms=2000, itl_ms=100)


@dataclass(frozen=True, slots=True)
class Cell:
    """One service under one load. Milliseconds; a percentile that too few requests support is None."""

    mix: str
    rate: float
    mode: str
    ok: int
    ttft_p50: float | None
    ttft_p90: float | None
    itl_p50: float | None
    itl_p99: float | None
    tokens_per_s: float | None
    goodput_rps: float | None  # requests a second within the limits
    good: float | None  # the share of requests that are
    of_best: float  # that share over the best mode's
    tight: float  # the share within tighter limits, and within looser ones
    loose: float
    in_time: float  # the share whose first token keeps its limit


def run(
    shape: str, quantization: str, seconds: float, rates: Sequence[float], out: Path, as_json: bool
) -> dict[str, Any]:
    """Measure each cell for about so long, show, write; returns the document.

    Raises `ConfigError` for an unknown shape or quantization.
    """
    parse_quantization(quantization)
    pair = BUNDLED if shape == "raw" else inflated_pair(shape)
    models = models_of(*pair, quantization)
    cells = list(measure(seconds, rates, models, modes=WITH_WHOLE))
    shown = console(as_json)
    for made in (sheet(cells), win_map(cells), calm(cells)):
        shown.print(table(*made))
    shared = isolation.measure(models)
    shown.print(table(*isolation.sheet(shared)))
    rows, cores = [flat(cell) for cell in cells], [flat(row) for row in shared]
    asked = {"shape": shape, "quantization": quantization, "limits": dataclasses.asdict(LIMITS)}
    document = {"machine": machine(2), **asked, "cells": rows, "cores": cores}
    write_json(out / "split.json", document)
    write_csv(out / "split.csv", rows)
    write_csv(out / "cores.csv", cores)
    shown.print(f"\nsplit.json, split.csv and cores.csv are in {out}")
    return document


def measure(
    seconds: float,
    rates: Sequence[float],
    models: Mapping[str, Any] | None = None,
    deadline_s: float = inf,
    modes: Mapping[str, Mapping[str, Any]] = MODES,
) -> Iterator[Cell]:
    """Every mode in each cell, for about so long. `models` is the part of a configuration that names them.

    No cell is begun after `deadline_s` on the monotonic clock.
    """
    with ExitStack() as stack, asyncio.Runner() as runner:
        addresses = {
            mode: stack.enter_context(serving({**values, **(models or {})})) for mode, values in modes.items()
        }
        for (mix, lengths), rate in itertools.product(MIXES.items(), rates):
            if time.monotonic() < deadline_s:
                num_requests = max(2, round(rate * seconds))
                yield from runner.run(_load(addresses, mix, lengths, rate, num_requests))


async def _load(
    addresses: Mapping[str, str], mix: str, lengths: str, rate: float, num_requests: int
) -> list[Cell]:
    """All services, one after the other, at the same requests."""
    found: dict[str, Run] = {}
    for mode, address in addresses.items():
        target = GrpcTarget(address)
        try:
            options = Options(
                num_requests=num_requests,
                arrival=Schedule(Arrival.POISSON, rate),
                input_lengths=lengths,
                output_lengths=OUTPUT_TOKENS,
                slo=LIMITS,
            )
            found[mode] = await LoadTest(target, Model(*await target.facts()), options).run()
        finally:
            await target.close()
    best = max(run.summary["attainment"] or 0.0 for run in found.values())
    return [_cell(mix, rate, mode, run, best) for mode, run in found.items()]


def _cell(mix: str, rate: float, mode: str, run: Run, best: float) -> Cell:
    summary = run.summary
    ttft, itl, good = summary["ttft_ms"], summary["itl_ms"], summary["attainment"]
    return Cell(
        mix,
        rate,
        mode,
        summary["ok"],
        ttft["p50"],
        ttft["p90"],
        itl["p50"],
        itl["p99"],
        summary["output_tokens_per_s"],
        summary["goodput_rps"],
        good,
        (good or 0.0) / best if best else 1.0,
        _share(TIGHT, run.records),
        _share(LOOSE, run.records),
        _share(Slo(ttft_ms=LIMITS.ttft_ms), run.records),
    )


def _share(limits: Slo, records: Sequence[RequestRecord]) -> float:
    return sum(limits.is_met(record) for record in records) / len(records)


def sheet(cells: Sequence[Cell]) -> Sheet:
    """All cells; latencies in ms."""
    columns = ("prompts", "requests/s", "mode", "TTFT p50", "p90", "ITL p50", "p99", "tokens/s")
    rows = [
        (
            *(cell.mix, f"{cell.rate:g}", cell.mode),
            *(_figure(value) for value in (cell.ttft_p50, cell.ttft_p90, cell.itl_p50, cell.itl_p99)),
            *(_figure(cell.tokens_per_s), _figure(cell.goodput_rps)),
            *(f"{cell.good or 0:.0%}", f"{cell.of_best:.2f}"),
        )
        for cell in cells
    ]
    title = f"split, unsplit and what pays; good: {_said(LIMITS)}"
    return Sheet(title, (*columns, "goodput/s", "good", "of best"), rows, 3)


def win_map(cells: Sequence[Cell]) -> Sheet:
    """Who keeps which limits at which load: shares of requests, and which of split and unsplit has more."""
    modes = dict.fromkeys(cell.mode for cell in cells)
    shares: dict[tuple[str, float, str], dict[str, float]] = {}
    for cell in cells:
        for limits, share in ((TIGHT, cell.tight), (LIMITS, cell.good or 0.0), (LOOSE, cell.loose)):
            shares.setdefault((cell.mix, cell.rate, _said(limits)), {})[cell.mode] = share
    rows = [
        (
            *(mix, f"{rate:g}", limits),
            *(f"{by_mode[mode]:.0%}" for mode in modes),
            _better(by_mode["split"], by_mode["unsplit"]),
            _over(by_mode["auto"], max(by_mode["split"], by_mode["unsplit"])),
        )
        for (mix, rate, limits), by_mode in sorted(shares.items(), key=lambda item: item[0][:2])
    ]
    columns = ("prompts", "requests/s", "limits", *modes, "better", "auto over better")
    return Sheet("within which limits: where the split wins and where it loses", columns, rows, 3)


def calm(cells: Sequence[Cell]) -> Sheet:
    """What long prompts do to those who read: p99 of gaps, ms, and who gets first tokens in time."""
    found = {(cell.mix, cell.rate, cell.mode): cell for cell in cells}
    rows = []
    for mix, rate in dict.fromkeys((cell.mix, cell.rate) for cell in cells):
        some = [found[mix, rate, mode] for mode in CALM]
        split, *_, whole = (cell.itl_p99 for cell in some)
        over = whole / split if split and whole else None
        gaps, in_time = (_figure(cell.itl_p99) for cell in some), (f"{cell.in_time:.0%}" for cell in some)
        rows.append((mix, f"{rate:g}", *gaps, _figure(over), *in_time))
    asked = f"TTFT ≤ {LIMITS.ttft_ms:g} ms"
    columns = ("prompts", "requests/s", *(f"ITL p99 {mode}" for mode in CALM), "whole over split")
    return Sheet("gaps while prompts come", (*columns, *(f"{asked} {mode}" for mode in CALM)), rows, 2)


def _said(limits: Slo) -> str:
    return f"TTFT ≤ {limits.ttft_ms:g} ms, ITL p99 of a request ≤ {limits.itl_ms:g} ms"


def _better(split: float, unsplit: float) -> str:
    return "split" if split > unsplit else "unsplit" if unsplit > split else "as good"


def _over(share: float, best: float) -> str:
    return f"{share / best:.2f}" if best else "–"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
