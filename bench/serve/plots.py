"""A run as PNG pictures, for slides and papers: the same figures as the page's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.plotting import COLORS, WIDE, label_axes, new_figure, save
from bench.serve.charts import Series, cdf, in_flight, per_second
from bench.serve.record import Outcome, RequestRecord
from bench.serve.scrape import readings_of
from bench.serve.server_side import occupancy, queue
from bench.serve.stages import STAGES, spans_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ROWS = 60  # of the waterfall
STAGE_COLORS = dict(
    zip(("late", *(stage.colour for stage in STAGES)), ("#d64545", "#9aa6b2", *COLORS), strict=False)
)


def draw(folder: Path, document: dict[str, Any], records: Sequence[RequestRecord]) -> Iterator[Path]:
    """`latencies.png`, `over_time.png`, `waterfall.png` and, where there are readings, `server.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    yield _latencies(folder / "latencies.png", records)
    yield _over_time(folder / "over_time.png", records)
    yield _waterfall(folder / "waterfall.png", records)
    readings = readings_of((document.get("server") or {}).get("readings", []))
    if len(readings) > 1:
        figure, (left, right) = new_figure(WIDE, 2)
        _lines(left, queue(readings), "requests, as the router counts them", "requests")
        _lines(right, occupancy(readings), "KV reserved", "% of capacity")
        yield save(figure, folder / "server.png")


def _latencies(file: Path, records: Sequence[RequestRecord]) -> Path:
    ok = [record for record in records if record.outcome is Outcome.OK]
    figure, axes = new_figure(WIDE, 3)
    found = (
        ("time to first token", [r.ttft_ms for r in ok if r.ttft_ms is not None]),
        ("gaps between arrivals", [gap for record in ok for gap in record.itl_ms]),
        ("end to end", [record.e2e_ms for record in ok]),
    )
    for one, (title, values) in zip(axes, found, strict=True):
        points = cdf(values)
        one.plot([x for x, _ in points], [y for _, y in points], color=COLORS[0])
        one.set_ylim(0, 1)
        label_axes(one, title, "ms", "share")
    return save(figure, file)


def _over_time(file: Path, records: Sequence[RequestRecord]) -> Path:
    end_s = max((record.end_s for record in records), default=0.0)
    tokens = [(when, float(count)) for record in records for when, count in record.arrivals]
    spans = [(record.sent_s, record.end_s) for record in records]
    figure, (left, right) = new_figure(WIDE, 2)
    _lines(left, [Series("tokens", per_second(tokens, end_s), "")], "output tokens per second", "tokens/s")
    _lines(right, [Series("requests", in_flight(spans, end_s), "")], "requests in flight", "requests")
    return save(figure, file)


def _waterfall(file: Path, records: Sequence[RequestRecord]) -> Path:
    """The first requests by their schedule, from top to bottom."""
    shown = sorted(records, key=lambda record: record.scheduled_s)[:MAX_ROWS]
    figure, (axes,) = new_figure((WIDE[0], 1.5 + 0.09 * len(shown)))
    bars = [(row, *span) for row, record in enumerate(shown) for span in spans_of(record)]
    for colour in {colour for *_, colour in bars}:
        rows, begins, ends, _ = zip(*(bar for bar in bars if bar[3] == colour), strict=True)
        axes.hlines(rows, begins, ends, STAGE_COLORS.get(colour, COLORS[5]), linewidth=4.5)
    for name, colour in (("late to be sent", "late"), *((stage.name, stage.colour) for stage in STAGES)):
        axes.hlines([], [], [], STAGE_COLORS[colour], linewidth=4.5, label=name)
    axes.set_ylim(len(shown) + 2.5, -1)  # the first above, and below room for the legend
    axes.set_yticks([])
    label_axes(axes, f"where the time of {len(shown)} of {len(records)} requests went", "s", "")
    axes.legend(frameon=False, ncols=5, loc="lower left", fontsize=8)
    return save(figure, file)


def _lines(axes: Axes, series: Sequence[Series], title: str, beside: str) -> None:
    for color, one in zip(COLORS, series, strict=False):
        axes.plot([x for x, _ in one.points], [y for _, y in one.points], color=color, label=one.name)
    axes.set_ylim(bottom=0)
    label_axes(axes, title, "s", beside)
    if len(series) > 1:
        axes.legend(frameon=False)
