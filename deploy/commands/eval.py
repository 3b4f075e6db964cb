"""`tandem eval`: run an experiment, show its tables, write its files."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from bench.eval.experiment import Settings
from deploy.models import resolve_model


def settings_of(params: dict[str, Any]) -> Settings:
    """From the options of a command. Raises `ConfigError` for models that are not there."""
    chosen = {name: params[name] for name in ("shape", "samples", "rounds", "threads")}
    chosen |= {name: resolve_model(params[name]) for name in ("target", "draft") if params[name]}
    return Settings(**chosen, texts=tuple(params["text"] or ()))


def run(name: str, params: dict[str, Any], out: Path, with_plots: bool, as_json: bool) -> None:
    """One experiment. Raises `ConfigError` for what cannot be measured here."""
    from bench.eval.catalog import experiment
    from bench.eval.report import Report
    from bench.measure import console
    from bench.plotting import require_matplotlib

    if with_plots:
        require_matplotlib()
    settings, chosen = settings_of(params), experiment(name)
    report = Report(chosen, settings, chosen.run(settings), command_line())
    files = report.save(out, with_plots)
    shown = console(as_json)
    report.show(shown)
    shown.print(f"\n{', '.join(file.name for file in files)} are in {out}")
    if as_json:
        print(json.dumps(report.document()))


def command_line() -> str:
    """As it was typed."""
    return shlex.join(["tandem", *sys.argv[1:]])
