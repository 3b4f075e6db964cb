"""From records to figures. Each is defined once, here or in `record`, and shown with its formula.

| figure | formula |
|---|---|
| TTFT | first token received - scheduled arrival; beside it, from the moment the request was sent |
| ITL | gap between consecutive arrivals of tokens; tokens that come together share one gap |
| TPOT | (end-to-end - TTFT) / (output tokens - 1) |
| end-to-end | end - scheduled arrival |
| goodput | requests that meet every stated limit, per second; failures count against it |

A percentile is refused (None) where fewer than one sample would lie beyond it: p99 needs a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench.serve.record import Outcome, RequestRecord

PERCENTILES = (50, 90, 99)
MAX_LAG_MS = 10.0  # of a client that keeps its schedule, at p99
ITL_PERCENTILE = 99  # of one request's own gaps, against the limit


class Limits(Protocol):
    """What requests have to meet: the same for all, or by class."""

    def is_met(self, record: RequestRecord) -> bool: ...


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in milliseconds; None is no limit. ITL: the 99th percentile of a request's own gaps."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def is_met(self, record: RequestRecord) -> bool:
        """Only a request that was answered meets anything."""
        if record.outcome is not Outcome.OK:
            return False
        gaps = record.itl_ms
        seen = {
            "ttft_ms": record.ttft_ms,
            "itl_ms": nearest_rank(gaps, ITL_PERCENTILE) if gaps else None,
            "tpot_ms": record.tpot_ms,
            "e2e_ms": record.e2e_ms,
        }
        return all(
            limit is None or value is None or value <= limit
            for name, value in seen.items()
            for limit in [getattr(self, name)]
        )


def nearest_rank(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed."""
    return sorted(values)[max(math.ceil(len(values) * percent / 100) - 1, 0)]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Nearest rank, or None if the sample is too small to have one value beyond it."""
    if not values or len(values) * (100 - percent) < 100 * (1 - 1e-9):
        return None
    return nearest_rank(values, percent)


def distribution(values: Sequence[float]) -> dict[str, float | int | None]:
    """`p50`, `p90`, `p99`, `mean` and `count`."""
    found: dict[str, float | int | None] = {f"p{p}": _rounded(percentile(values, p)) for p in PERCENTILES}
    found["mean"] = _rounded(sum(values) / len(values)) if values else None
    found["count"] = len(values)
    return found


def summarize(
    records: Sequence[RequestRecord], slo: Limits, loop_lags_ms: Sequence[float], *, is_closed: bool = False
) -> dict[str, Any]:
    """All figures of a run. `loop_lags_ms` are how late the client's own clock ticks were.

    The client is the bottleneck if it was late to send, at p99. A closed loop has no schedule to be late
    for; there its clock tells.
    """
    ok = [record for record in records if record.outcome is Outcome.OK]
    counted = [record for record in records if record.outcome is not Outcome.CANCELLED]
    began_s = min((record.scheduled_s for record in records), default=0.0)
    duration_s = max((record.end_s for record in records), default=0.0) - began_s
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    num_good = sum(slo.is_met(record) for record in counted)
    num_arrivals = sum(len(record.arrivals) for record in ok)
    own_lags_ms = loop_lags_ms if is_closed else [record.lag_ms for record in records]
    return {
        "requests": len(records),
        "ok": len(ok),
        "errors": len(counted) - len(ok),
        "cancelled": len(records) - len(counted),
        "duration_s": round(duration_s, 3),
        "request_rps": _rounded(len(ok) * per_s),
        "output_tokens_per_s": _rounded(sum(r.output_tokens for r in records) * per_s),
        "prompt_tokens_per_s": _rounded(sum(r.prompt_tokens for r in ok) * per_s),
        "goodput_rps": _rounded(num_good * per_s),
        "attainment": _ratio(num_good, len(counted)),
        **_latencies(ok),
        "tokens_per_arrival": _ratio(sum(r.output_tokens for r in ok), num_arrivals),
        "cached_share": _ratio(sum(r.cached_tokens for r in ok), sum(r.prompt_tokens for r in ok)),
        "acceptance_rate": _ratio(sum(r.accepted for r in records), sum(r.drafted for r in records)),
        "most_in_flight": most_in_flight(records),
        "dispatch_lag_ms": distribution([record.lag_ms for record in records]),
        "loop_lag_ms": distribution(loop_lags_ms),
        "client_bottleneck": bool(own_lags_ms) and nearest_rank(own_lags_ms, 99) > MAX_LAG_MS,
        "errors_by_reason": _by_reason(counted),
        "classes": _by_class(counted, slo, per_s),
    }


def _latencies(ok: Sequence[RequestRecord]) -> dict[str, dict[str, float | int | None]]:
    """Of those that were answered."""
    return {
        "ttft_ms": distribution([r.ttft_ms for r in ok if r.ttft_ms is not None]),
        "ttft_sent_ms": distribution([r.ttft_sent_ms for r in ok if r.ttft_sent_ms is not None]),
        "itl_ms": distribution([gap for record in ok for gap in record.itl_ms]),
        "tpot_ms": distribution([r.tpot_ms for r in ok if r.tpot_ms is not None]),
        "e2e_ms": distribution([record.e2e_ms for record in ok]),
    }


def most_in_flight(records: Sequence[RequestRecord]) -> int:
    """The largest number of requests that were open at one moment."""
    changes = sorted([(r.sent_s, 1) for r in records] + [(r.end_s, -1) for r in records])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _by_reason(records: Sequence[RequestRecord]) -> dict[str, int]:
    reasons = [record.error for record in records if record.outcome is Outcome.FAILED]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def _by_class(records: Sequence[RequestRecord], slo: Limits, per_s: float) -> dict[str, dict[str, Any]]:
    """Figures of each class, where requests have classes. Rates are over the whole run."""
    names = sorted({record.request_class for record in records})
    found: dict[str, dict[str, Any]] = {}
    for name in names if any(names) else ():
        own = [record for record in records if record.request_class == name]
        ok = [record for record in own if record.outcome is Outcome.OK]
        num_good = sum(slo.is_met(record) for record in own)
        found[name] = {
            "requests": len(own),
            "ok": len(ok),
            "goodput_rps": _rounded(num_good * per_s),
            "attainment": _ratio(num_good, len(own)),
            **_latencies(ok),
        }
    return found


def _ratio(part: float, whole: float) -> float | None:
    return _rounded(part / whole) if whole else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
