"""What searches found, as rows and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.measure import Sheet
from bench.serve.metrics import Slo
from bench.serve.search import Found

Finds = Mapping[tuple[str, str], Found]  # by the limits' name and the system's


@dataclass(frozen=True, slots=True)
class Row:
    """One system within one pair of limits. Rates are requests per second."""

    limits: str
    ttft_ms: float | None
    itl_ms: float | None  # of the 99th percentile of a request's own gaps
    system: str
    rate: float | None  # the largest that held; None: not even one request after the other did
    failing_rate: float | None  # the smallest that did not; None: time was over before one failed
    good: float | None  # the share of requests within the limits at the rate that held
    goodput: float | None  # of these per second there, until the last answer: less than the rate if it lags
    ratio: float | None  # the first system's rate over this one's
    failed: int  # requests in all its runs that were refused or failed, instead of being late
    client_late: bool  # in some run at that rate the load test itself was late to send


def rows_of(found: Finds, limits: Mapping[str, Slo], systems: Sequence[str]) -> list[Row]:
    """Limits by limits, in the systems' order: the first is the one that others are compared with."""
    rows = []
    for label, system in ((label, system) for label in limits for system in systems):
        if (label, system) not in found:
            continue
        one, slo = found[label, system], limits[label]
        rate = one.holding_rate
        base = first.holding_rate if (first := found.get((label, systems[0]))) else None
        held = [trial for trial in one.trials if trial.rate == rate]
        rows.append(
            Row(
                limits=label,
                ttft_ms=slo.ttft_ms,
                itl_ms=slo.itl_ms,
                system=system,
                rate=rate,
                failing_rate=one.failing_rate,
                good=fmean(trial.attainment for trial in held) if held else None,
                goodput=one.goodput_rps if held else None,
                ratio=base / rate if base and rate else None,
                failed=sum(trial.errors for trial in one.trials),
                client_late=any(trial.client_bottleneck for trial in held),
            )
        )
    return rows


def sheet(title: str, rows: Sequence[Row]) -> Sheet:
    columns = ("limits", "system", "requests/s", "fails at", "good", "goodput", "failed", "ratio")
    cells = [
        (
            f"{row.limits}: TTFT ≤ {row.ttft_ms:g} ms, ITL p99 ≤ {row.itl_ms:g} ms",
            row.system,
            _figure(row.rate, "none") + ("*" if row.client_late else ""),
            _figure(row.failing_rate, "–"),
            "–" if row.good is None else f"{row.good:.0%}",
            _figure(row.goodput, "–"),
            str(row.failed),
            _figure(row.ratio, "–"),
        )
        for row in rows
    ]
    return Sheet(title, columns, cells, 2)


def _figure(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.2f}"
