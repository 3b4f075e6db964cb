"""Speculation tables: k draft tokens per step, confidence threshold τ, greedy and sampled, one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from bench.eval import published
from bench.eval.attempt import attempt
from bench.eval.decoding import (
    Arm,
    Row,
    measure,
    num_runs,
    per_round,
    rig_of,
    sampling_params,
)
from bench.eval.experiment import Chart, Findings, Series, Settings
from bench.eval.models import pair_of
from bench.eval.rows import COLUMNS, REMARK, cells_of, row_of
from bench.eval.samples import first_samples
from bench.eval.texts import sources
from bench.eval.utilization import remark as utilization
from bench.measure import Meter, Sheet
from bench.speculation.rig import Rig, Setup
from bench.speculation.text import Tokens

NAME = "speculation"
TITLE = "Speculation by k and τ"
K, TAU = (3, 5, 7), (0.0001, 0.2)
SAMPLINGS = ("greedy", "sampled")
PLAIN = (0, 0.0)  # k and τ of plain decoding
CELLS = (PLAIN, *itertools.product(K, TAU))
SETUP = Setup()


def run(settings: Settings) -> Findings:
    """Every cell against plain decoding of the same samples, one at a time."""
    subject = pair_of(settings)
    source = next(sources(settings, subject.pair.target))
    samples = first_samples(settings, subject, source)
    count = len(samples.prompts)
    rig = rig_of(settings, subject.pair, SETUP, per_round(count, 1, settings.rounds))
    with Meter(NAME, len(SAMPLINGS) * num_runs(len(CELLS), count, 1, settings.rounds)) as meter:
        found, skipped = attempt(
            {sampling: sampling for sampling in SAMPLINGS},
            lambda sampling: _rows(rig, subject.name, samples.prompts, sampling, settings, meter),
            settings,
            meter,
        )
    remarks = [
        f"{subject.label}; {source.name}. {samples.remark}",
        *(REMARK, utilization(settings.device), published.SPECULATION_SETTING),
    ]
    return Findings(
        tables={"rows": found},
        sheets=[_sheet(found)],
        charts=list(_charts(found)),
        remarks=remarks + skipped,
        published=published.SPECULATION,
    )


def _rows(
    rig: Rig, pair: str, prompts: Sequence[Tokens], sampling: str, settings: Settings, meter: Meter
) -> Iterator[Row]:
    arms = {str(cell): Arm.of(rig, *cell) for cell in CELLS}
    outcomes = measure(arms, prompts, 1, sampling_params(sampling), settings.rounds, meter.step)
    for cell in CELLS:
        theirs, ours = outcomes[str(PLAIN)], outcomes[str(cell)]
        yield row_of(pair, SETUP, cell, sampling, ours, theirs)


def _sheet(rows: Sequence[Row]) -> Sheet:
    columns = ("sampling", "τ", "k", *COLUMNS, "published, 1B draft", "3B draft")
    lines = [
        (
            *(row.sampling, f"{row.tau:g}" if row.k else "–", str(row.k) if row.k else "plain"),
            *cells_of(row),
            *(published.cells(_others(row)) if row.k else ("1.00x", "")),
        )
        for row in sorted(rows, key=lambda row: (row.sampling, row.tau, row.k))
    ]
    return Sheet("speculation against plain decoding, batch 1", columns, lines, 3)


def _others(row: Row) -> Iterator[published.Speculated]:
    key = (row.sampling, row.tau, row.k)
    return (theirs for theirs in published.SPECULATION if (theirs.sampling, theirs.tau, theirs.k) == key)


def _charts(rows: Sequence[Row]) -> Iterator[Chart]:
    """Speed-up and acceptance against k; greedy, with the published 1B draft in dashes."""
    for name, beside in (("speedup", "speed-up over plain"), ("acceptance", "accepted of drafted, %")):
        ours = [
            Series(f"{sampling}, τ = {tau:g}", K, _values(rows, name, sampling, tau))
            for sampling in SAMPLINGS
            for tau in TAU
        ]
        drawn = [series for series in ours if series.values]
        theirs = [
            Series(f"1B / 8B published, τ = {tau:g}", K, _published(name, tau), is_expected=True)
            for tau in TAU
        ]
        title = f"{rows[0].pair if rows else ''}: {name.replace('speedup', 'speed-up')}, batch 1"
        level = 1.0 if name == "speedup" else None
        yield Chart(name, title, "draft tokens per step, k", beside, [*drawn, *theirs], level=level)


def _values(rows: Sequence[Row], what: str, sampling: str, tau: float) -> list[float]:
    found = [row for row in rows if row.k and (row.sampling, row.tau) == (sampling, tau)]
    if what == "speedup":
        return [row.speedup.median for row in found]
    return [100 * row.acceptance_rate for row in found]


def _published(what: str, tau: float) -> list[float]:
    found = [r for r in published.SPECULATION if (r.draft, r.sampling, r.tau) == ("1B", "greedy", tau)]
    return [row.speedup if what == "speedup" else 100 * row.acceptance_rate for row in found]
