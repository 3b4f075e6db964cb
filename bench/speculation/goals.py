"""The figures that the project promises, looked up in what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.speculation.peers import TANDEM
from bench.speculation.runner import RAW, Results, small_draft
from bench.speculation.sweep import Row
from tandem.quantizations import AUTO

BEST = {1: 2.0, 4: 1.4}  # speed-up of the grown pair with the best k, by batch
BEST_RAW = 1.3  # of the pair as it was trained, batch 1
NEVER_BELOW = 0.97  # with k auto, at any batch
OVER_ASSISTED = 3.0  # tokens/s over transformers' assisted generation


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio, the least it should be, and the cell it comes from."""

    what: str
    measured: float
    wanted: float
    where: str
    holds: bool


def goals(results: Results, large: str, quantization: str) -> list[Goal]:
    """Those whose cells were measured, with the draft model in any precision and the target in that one."""
    return [*_speedups(results, large, quantization), *_peers(results, large)]


def _speedups(results: Results, large: str, quantization: str) -> Iterator[Goal]:
    wanted_rows = ("model", quantization, "greedy")
    ours = [row for row in results.rows if (row.draft, row.target_precision, row.sampling) == wanted_rows]
    for pair in (large, small_draft(large)):
        for batch, wanted in BEST.items():
            rows = [row for row in ours if row.pair == pair and row.batch == batch]
            yield from _goal(f"{pair}, batch {batch}, best k", rows, wanted, is_best=True)
    rows = [row for row in ours if row.pair == RAW and row.batch == 1]
    yield from _goal("raw, batch 1, best k", rows, BEST_RAW, is_best=True)
    for pair in (large, small_draft(large), RAW):
        rows = [row for row in ours if row.pair == pair and row.k == "auto"]
        yield from _goal(f"{pair}, k auto, worst batch", rows, NEVER_BELOW, is_best=False)


def _goal(what: str, rows: list[Row], wanted: float, is_best: bool) -> Iterator[Goal]:
    if rows:
        ranked = sorted(rows, key=lambda row: row.speedup.median)
        row = ranked[-1 if is_best else 0]
        draft = "" if row.draft_precision == AUTO else f", {row.draft_precision} draft"
        where = f"batch {row.batch}, k {row.k}, tau {row.tau:g}{draft}"
        yield Goal(what, row.speedup.median, wanted, where, row.speedup.median >= wanted)


def _peers(results: Results, large: str) -> Iterator[Goal]:
    assisted = [row for row in results.peers if row.pair == large and "assisted" in row.system]
    if assisted:
        nearest = min(assisted, key=lambda row: row.tandem_ratio.median)
        ratio = nearest.tandem_ratio.median
        yield Goal(
            f"{large}, {TANDEM}", ratio, OVER_ASSISTED, f"over {nearest.system}", ratio >= OVER_ASSISTED
        )
