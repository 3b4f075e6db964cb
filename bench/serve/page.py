"""A run as one HTML page that needs nothing but itself: no network, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.serve import charts
from bench.serve.charts import Row, Series
from bench.serve.protocol import sentence
from bench.serve.record import Outcome, RequestRecord
from bench.serve.server_side import server_side
from bench.serve.stages import STAGES, spans_of

MAX_ROWS = 200  # of the timeline
MAX_APART = 60  # of the one where all begin at zero
STYLE_FILE = Path(__file__).with_name("page.css")
FORMULAS = {
    "ttft_ms": ("TTFT", "first token received − scheduled arrival"),
    "ttft_sent_ms": ("TTFT from sending", "first token received − moment of sending"),
    "itl_ms": ("ITL", "gap between arrivals of tokens; tokens that come together share one"),
    "tpot_ms": ("TPOT", "(end-to-end − TTFT) / (output tokens − 1)"),
    "e2e_ms": ("end-to-end", "end − scheduled arrival"),
    "dispatch_lag_ms": ("dispatch lag", "moment of sending − scheduled arrival: the client's own delay"),
}


def page(document: dict[str, Any], records: Sequence[RequestRecord]) -> str:
    """The whole page of a run's document (`bench.serve.report`) and its records."""
    summary = document["summary"]
    about = (document["target"], describe(document["options"]), document["began"])
    parts = [
        f"<h1>Load test of {escape(document['model'])}</h1>",
        f"<p>{escape(' · '.join(about))}</p>",
        _verdict(summary),
        _tiles(summary),
        "<h2>Latencies</h2>",
        _table(summary),
        f'<div class="pair">{_latencies(records)}</div>',
        _classes(summary["classes"], document["options"]),
        "<h2>Over time</h2>",
        f'<div class="pair">{_over_time(records)}</div>',
        "<h2>The server over time</h2>",
        server_side(document),
        "<h2>Where the time of each request went</h2>",
        _timeline(records),
        "<h2>Speculation</h2>",
        _acceptance(summary, records),
        _protocol(document.get("protocol")),
        _search(document.get("search")),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Load test</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE_FILE.read_text()}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def describe(options: dict[str, Any]) -> str:
    """The load in one line."""
    arrival = options["arrival"]
    how = {
        "closed": f"{options['concurrency']} at once",
        "burst": "all at once",
        "trace": "as the trace says",
        "gamma": f"gamma {arrival['rate']:g}/s, burstiness {arrival['burstiness']:g}",
        "ramp": f"ramp {arrival['rate']:g} to {arrival['ramp_to']:g}/s",
    }.get(arrival["kind"], f"{arrival['kind']} {arrival['rate']:g}/s")
    lengths = f"{options['input_lengths']} → {options['output_lengths']} tokens"
    kinds = [
        f"{one['name']} {one['share']:g} of {one['input_lengths']} → {one['output_lengths']} tokens"
        for one in options["classes"]
    ]
    what = options["input"] or "; ".join(kinds) or lengths
    turns = "" if options["turns"] == "1" else f", {options['turns']} turns {options['think_s']:g} s apart"
    return f"{options['num_requests']} requests{turns}, {how}, {what}, seed {options['seed']}"


def limits_of(name: str, options: dict[str, Any]) -> str:
    """The limits of a class, as words."""
    limits = options["class_slos"].get(name, options["slo"])
    stated = [
        f"{key.removesuffix('_ms').upper()} ≤ {value:g} ms"
        for key, value in limits.items()
        if value is not None
    ]
    return ", ".join(stated) or "none"


def _verdict(summary: dict[str, Any]) -> str:
    warnings = []
    if summary["client_bottleneck"]:
        warnings.append(
            "The client was late itself (99th percentile of its lag over 10 ms): "
            "these latencies are not the service's alone."
        )
    if num_cut := summary.get("cut"):
        warnings.append(f"{num_cut} requests were cut to the model's context: the file has longer ones.")
    return "".join(f'<p class="warn">{warning}</p>' for warning in warnings)


def _tiles(summary: dict[str, Any]) -> str:
    tiles = (
        ("goodput", f"{_figure(summary['goodput_rps'])} req/s"),
        ("output", f"{_figure(summary['output_tokens_per_s'])} tok/s"),
        ("TTFT p50", f"{_figure(summary['ttft_ms']['p50'])} ms"),
        ("TTFT p99", f"{_figure(summary['ttft_ms']['p99'])} ms"),
        ("TPOT p50", f"{_figure(summary['tpot_ms']['p50'])} ms"),
        ("answered", f"{summary['ok']} of {summary['requests']}"),
        ("failed", f"{summary['errors']}"),
        ("most in flight", f"{summary['most_in_flight']}"),
        ("prompt tokens cached", _percent(summary["cached_share"])),
        ("draft tokens accepted", _percent(summary["acceptance_rate"])),
    )
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{name}</span></div>' for name, value in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _table(summary: dict[str, Any]) -> str:
    titles = ("ms", "p50", "p90", "p99", "mean", "samples", "formula")
    head = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    rows = [
        f"<tr><td>{name}</td>"
        + "".join(
            f"<td>{_figure(summary[key][column])}</td>" for column in ("p50", "p90", "p99", "mean", "count")
        )
        + f"<td>{formula}</td></tr>"
        for key, (name, formula) in FORMULAS.items()
    ]
    return f"<table>{head}{''.join(rows)}</table><p>– : too few samples for this percentile</p>"


def _classes(classes: dict[str, Any], options: dict[str, Any]) -> str:
    """A row for each class, where there are any."""
    if not classes:
        return ""
    titles = (
        "class",
        "requests",
        "answered",
        "goodput, req/s",
        "within limits",
        "TTFT p50",
        "TPOT p50",
        "limits",
    )
    head = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    rows = []
    for name, one in classes.items():
        medians = (f"{_figure(one[key]['p50'])} ms" for key in ("ttft_ms", "tpot_ms"))
        cells = (
            one["requests"],
            one["ok"],
            _figure(one["goodput_rps"]),
            _percent(one["attainment"]),
            *medians,
        )
        rows.append(
            f"<tr><td>{escape(name or 'others')}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}"
            f"<td>{escape(limits_of(name, options))}</td></tr>"
        )
    return f"<h2>By class</h2><table>{head}{''.join(rows)}</table>"


def _latencies(records: Sequence[RequestRecord]) -> str:
    ok = [record for record in records if record.outcome is Outcome.OK]
    ttft = [
        Series("from schedule", charts.cdf([r.ttft_ms for r in ok if r.ttft_ms is not None]), "blue"),
        Series(
            "from sending", charts.cdf([r.ttft_sent_ms for r in ok if r.ttft_sent_ms is not None]), "orange"
        ),
    ]
    gaps = [Series("ITL", charts.cdf([gap for record in ok for gap in record.itl_ms]), "blue")]
    tpot = [Series("TPOT", charts.cdf([r.tpot_ms for r in ok if r.tpot_ms is not None]), "blue")]
    e2e = [Series("end-to-end", charts.cdf([record.e2e_ms for record in ok]), "blue")]
    return (
        charts.lines("Time to first token", "ms", ttft, is_cdf=True)
        + charts.lines("Gaps between arrivals", "ms", gaps, is_cdf=True, y_unit="share of gaps")
        + charts.lines("Time per output token", "ms", tpot, is_cdf=True)
        + charts.lines("End to end", "ms", e2e, is_cdf=True)
    )


def _over_time(records: Sequence[RequestRecord]) -> str:
    end_s = max((record.end_s for record in records), default=0.0)
    tokens = [(when, float(count)) for record in records for when, count in record.arrivals]
    spans = [(record.sent_s, record.end_s) for record in records]
    rate = Series("tokens", charts.per_second(tokens, end_s), "blue")
    return charts.lines("Output tokens per second", "s", [rate]) + charts.lines(
        "Requests in flight", "s", [Series("in flight", charts.in_flight(spans, end_s), "orange")]
    )


def _timeline(records: Sequence[RequestRecord]) -> str:
    """As it went, and each request by itself from its scheduled arrival."""
    shown = sorted(records, key=lambda record: record.scheduled_s)[:MAX_ROWS]
    legend = [("late to be sent", "late"), *((stage.name, stage.colour) for stage in STAGES)]
    if any(not record.stages_ms for record in shown):
        legend.append(("until the first token, stages unknown", "other"))
    which = (
        f"the first {len(shown)} of {len(records)} requests" if len(shown) < len(records) else "all requests"
    )
    apart = [_row(record, record.scheduled_s) for record in shown[:MAX_APART]]
    return charts.waterfall(f"As it went: {which}", [_row(record, 0.0) for record in shown], legend) + (
        charts.waterfall(f"From each scheduled arrival: the first {len(apart)}", apart, legend)
    )


def _row(record: RequestRecord, zero_s: float) -> Row:
    stages = ", ".join(f"{name.removesuffix('_ms')} {value:.0f}" for name, value in record.stages_ms.items())
    said = f"{record.index}: {record.prompt_tokens} + {record.output_tokens} tokens, {record.outcome.value}"
    shifted = [(begin - zero_s, end - zero_s, colour) for begin, end, colour in spans_of(record)]
    return Row(f"{said} {record.error} {stages and f'(ms: {stages})'}", shifted)


def _acceptance(summary: dict[str, Any], records: Sequence[RequestRecord]) -> str:
    rates = [record.accepted / record.drafted for record in records if record.drafted]
    if not rates:
        return "<p>Nothing was drafted.</p>"
    bins = [0] * 10
    for rate in rates:
        bins[min(int(rate * 10), 9)] += 1
    counts = [(f"{10 * number}–{10 * number + 10}", float(count)) for number, count in enumerate(bins)]
    overall = f"{100 * summary['acceptance_rate']:.1f} % of all draft tokens were accepted; "
    arrivals = f"{_figure(summary['tokens_per_arrival'])} tokens came together on average."
    chart = charts.bars("Acceptance by request", "% of the request's draft tokens", counts, "decode")
    return f'<p>{overall}{arrivals}</p><div class="pair">{chart}</div>'


def _protocol(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"<h2>Protocols</h2><p>{escape(sentence(found))}</p>"


def _search(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    series = Series("trials", sorted((t["rate"], t["attainment"]) for t in found["trials"]), "blue")
    low, high = found["goodput_ci"]
    said = (
        f"held {_figure(found['holding_rate'])} req/s, failed at {_figure(found['failing_rate'])}; goodput "
        f"{_figure(found['goodput_rps'])} req/s (95 % interval {_figure(low)} to {_figure(high)})"
    )
    num_late = sum(trial["client_bottleneck"] for trial in found["trials"])
    num_stopped = sum(trial["stopped"] for trial in found["trials"])
    said += (
        f". {len(found['trials'])} trials: {num_stopped} stopped when they could not hold any more, "
        f"in {num_late} the client was the bottleneck."
    )
    chart = charts.lines("Share within the limits, by rate", "requests per second", [series])
    return f'<h2>Search for the most goodput</h2><p>{said}</p><div class="pair">{chart}</div>'


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
