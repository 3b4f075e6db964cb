"""Measure what this machine and the time allow, and say what was not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from bench.eval.experiment import Settings
from bench.measure import Meter
from tandem.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")


def attempt(
    wanted: Mapping[str, T], measure: Callable[[T], Iterable[R]], settings: Settings, meter: Meter
) -> tuple[list[R], list[str]]:
    """Rows of everything that could be measured, and a remark on each thing that could not."""
    rows: list[R] = []
    remarks: list[str] = []
    late: list[str] = []
    for name, what in wanted.items():
        meter.say(name)
        if settings.left_s <= 0:
            late.append(name)
            continue
        try:
            rows += measure(what)
        except ConfigError as error:
            remarks.append(f"Not measured: {name}: {error}.")
    if late:
        remarks.append(f"Not measured, as there was no time left: {', '.join(late)}.")
    return rows, remarks
