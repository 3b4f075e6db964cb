"""Findings for those who keep experiments elsewhere: TensorBoard or Weights & Biases, where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from bench.eval.report import Report
from bench.measure import flat
from tandem.errors import ConfigError

Tracker = Callable[[Report], None]  # logs one experiment


def tracker_of(place: str) -> Tracker:
    """Of `tensorboard:DIR` or `wandb:PROJECT`.

    Raises `ConfigError` for other places, and for a package that is not installed.
    """
    kind, _, where = place.partition(":")
    if kind not in TRACKERS or not where:
        raise ConfigError(f"--log must be tensorboard:DIR or wandb:PROJECT, not {place}")
    if importlib.util.find_spec(kind) is None:
        raise ConfigError(f"--log {place} needs {kind}: pip install {kind}")
    return lambda report: TRACKERS[kind](where, report)


def nowhere(report: Report) -> None:
    """Where nobody asked."""


def _tensorboard(folder: str, report: Report) -> None:
    """A scalar per figure, the row's number as its step, and the tables as text."""
    from torch.utils.tensorboard import SummaryWriter

    name = report.experiment.NAME
    with SummaryWriter(f"{folder}/{name}") as writer:
        writer.add_text(name, report.markdown())
        for table, rows in report.findings.tables.items():
            for step, row in enumerate(rows):
                for figure, value in flat(row).items():
                    if isinstance(value, Real):
                        writer.add_scalar(f"{table}/{figure}", float(value), step)


def _wandb(project: str, report: Report) -> None:
    """A run per experiment, with its settings and a table of rows."""
    import wandb

    document = report.document()
    with wandb.init(project=project, name=report.experiment.NAME, config=document["settings"]) as run:
        for table, rows in report.findings.tables.items():
            lines = [flat(row) for row in rows]
            columns = list(lines[0]) if lines else []
            run.log({table: wandb.Table(columns=columns, data=[list(line.values()) for line in lines])})


TRACKERS: Mapping[str, Callable[[str, Report], Any]] = {"tensorboard": _tensorboard, "wandb": _wandb}
