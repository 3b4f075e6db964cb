"""What a queue's files say to whoever only reads them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tandem.errors import ConfigError
from tandem.offline.finished import FinishedLines
from tandem.offline.job import Job, holder, load_job
from tandem.offline.journal import sealed_records
from tandem.offline.record import line_of, parse
from tandem.offline.results import error_path


def known_job(output: Path) -> Job:
    """Raises `ConfigError` if no queue was started with this output."""
    job = load_job(output)
    if job is None:
        raise ConfigError(f"no queue was started with --output {output}")
    return job


def facts(output: Path) -> dict[str, Any]:
    """Counts of the records there are, and what the runner last said if one is at work."""
    job, pid = known_job(output), holder(output)
    finished = FinishedLines()
    for _, sealed in sealed_records(output):
        finished.add(line_of(sealed))
    completed = finished.count
    for _, sealed in sealed_records(error_path(output)):
        finished.add(line_of(sealed))
    live = job.progress if pid is not None else {}
    return {
        "state": _state(job, finished.count, pid),
        "total": job.total,
        "completed": completed,
        "failed": finished.count - completed,
        "in_flight": live.get("in_flight", 0),
        "duplicated": finished.num_repeated,
        "tokens_per_s": round(live.get("tokens_per_s", 0.0), 1),
        "goodput_rps": round(live.get("goodput_rps", 0.0), 3),
        "eta_s": live.get("eta_s"),
        "pid": pid,
        "model": job.model,
        "input": job.input,
    }


def in_input_order(output: Path, *, with_errors: bool) -> Iterator[dict[str, Any]]:
    """Whole records by line of the input. Memory is a few bytes a record."""
    paths = [output, error_path(output)] if with_errors else [output]
    lines, places = array("q"), array("q")  # a place is an offset times two, plus which file
    for which, path in enumerate(paths):
        for offset, sealed in sealed_records(path):
            lines.append(line_of(sealed))
            places.append(2 * offset + which)
    files = [path.open("rb") for path in paths if path.exists()]
    try:
        for index in np.argsort(lines, kind="stable"):
            file = files[places[index] % 2]
            file.seek(places[index] // 2)
            yield parse(file.readline())
    finally:
        for file in files:
            file.close()


def _state(job: Job, num_finished: int, pid: int | None) -> str:
    if pid is not None:
        return "running"
    if job.is_checked and num_finished == job.total:
        return "finished"
    return "cancelled" if job.is_cancelled else "interrupted"
