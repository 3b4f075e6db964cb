"""The part of a run's page that the server's own figures fill."""

from __future__ import annotations

from html import escape
from typing import Any

from bench.serve import charts
from bench.serve.charts import Series
from bench.serve.scrape import Reading, acceptance, readings_of

COLOURS = ("decode", "prefill", "transfer", "other", "orange", "queue", "late")


def server_side(document: dict[str, Any]) -> str:
    """Queue, KV occupancy and acceptance over time, or why there are none."""
    found = document.get("server")
    if found is None:
        return (
            "<p>The server's /metrics were not read: over gRPC, name the service's URL by --http-server.</p>"
        )
    readings = readings_of(found["readings"])
    said = f"{len(readings)} readings of {escape(found['url'])}, {found['failed']} failed."
    if len(readings) < 2:
        return f"<p>{said} That is too few to show anything.</p>"
    return f'<p>{said}</p><div class="pair">{"".join(_charts(readings))}</div>'


def occupancy(readings: list[Reading]) -> list[Series]:
    """A line for each worker and for the store, in percent of its capacity."""
    workers = sorted({worker for reading in readings for worker in reading.kv})
    return [
        Series(
            worker,
            [(one.at_s, 100 * one.kv[worker]) for one in readings if worker in one.kv],
            COLOURS[number % len(COLOURS)],
        )
        for number, worker in enumerate(workers)
    ]


def queue(readings: list[Reading]) -> list[Series]:
    """Requests that wait for memory, and those that have it."""
    return [
        Series("running", [(one.at_s, one.running) for one in readings], "decode"),
        Series("waiting", [(one.at_s, one.waiting) for one in readings], "late"),
    ]


def _charts(readings: list[Reading]) -> list[str]:
    found = [
        charts.lines("Requests, as the router counts them", "s", queue(readings), y_unit="requests"),
        charts.lines("KV reserved", "s", occupancy(readings), y_unit="% of capacity"),
    ]
    if accepted := acceptance(readings):
        points = [(at_s, 100 * share) for at_s, share in accepted]
        line = [Series("between two readings", points, "blue")]
        found.append(charts.lines("Acceptance", "s", line, y_unit="% of draft tokens"))
    return found
