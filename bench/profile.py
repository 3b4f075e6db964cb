"""A profile beside a benchmark: a few more steps that no figure is taken from, as recording costs time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tandem.config import ProfileConfig
from tandem.engine.model_runner import ModelRunner
from tandem.engine.profiler import TEXT, profiled


def record(folder: Path, name: str, model: ModelRunner, call: Callable[[], object]) -> str:
    """Where the time of the steps of `call` goes; the trace and this text are in the folder."""
    is_native = model.implementation == "native"
    with profiled(ProfileConfig(dir=folder), name, model.describe(), is_native=is_native):
        call()
    return (folder / f"{name}{TEXT}").read_text()
