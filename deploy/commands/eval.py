"""`tandem eval`: run an experiment, show its tables, write its files."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.eval.experiment import Settings
from deploy.models import resolve_model
from tandem.config_model import ModelConfig

if TYPE_CHECKING:
    from bench.eval.trackers import Tracker

FOLDERS = ("--out", "--page", "--log")  # options of what a command writes, not of what it measures


def settings_of(params: dict[str, Any]) -> Settings:
    """From the options of a command. Raises `ConfigError` for models and devices that are not there."""
    from bench.eval import utilization
    from tandem.engine.loading import check_device

    check_device(ModelConfig(device=params["device"]).device)
    utilization.check(params["device"])
    chosen = {name: params[name] for name in ("shape", "samples", "rounds", "threads", "device")}
    chosen |= {name: resolve_model(params[name]) for name in ("target", "draft") if params[name]}
    deadline_s = time.monotonic() + 60 * params["minutes"]
    return Settings(**chosen, deadline_s=deadline_s, texts=tuple(params["text"] or ()))


def run(name: str, params: dict[str, Any], out: Path, with_plots: bool, as_json: bool) -> None:
    """One experiment. Raises `ConfigError` for what cannot be measured here."""
    from bench.eval.catalog import experiment
    from bench.eval.report import Report
    from bench.measure import console

    track = _prepare(params["log"], with_plots)
    settings, chosen = settings_of(params), experiment(name)
    report = Report(chosen, settings, chosen.run(settings), command_line())
    files = report.save(out, with_plots)
    track(report)
    shown = console(as_json)
    report.show(shown)
    shown.print(f"\n{', '.join(file.name for file in files)} are in {out}")
    if as_json:
        print(json.dumps(report.document()))


def run_all(
    params: dict[str, Any], minutes: float, out: Path, page: Path | None, with_plots: bool, as_json: bool
) -> None:
    """Every experiment, and the page. Raises `ConfigError` for models that are not there."""
    from bench.eval.suite import Suite, default_page
    from bench.measure import console

    track = _prepare(params["log"], with_plots)
    suite, shown = Suite(settings_of(params), minutes, command_line()), console(as_json)
    page = page or default_page(out)
    for report in suite.run():
        report.save(out, with_plots)
        track(report)
        report.show(shown)
        suite.write(page)  # what is done outlives what fails later
    suite.write(page)
    shown.print(f"\n{page} has all tables, {out} the files of each experiment")
    if as_json:
        print(json.dumps({report.experiment.NAME: report.document() for report in suite.reports}))


def _prepare(log: str | None, with_plots: bool) -> Tracker:
    """Whatever could be missing is missed before anything is measured."""
    from bench.eval.trackers import nowhere, tracker_of
    from bench.plotting import require_matplotlib

    if with_plots:
        require_matplotlib()
    return tracker_of(log) if log else nowhere


def command_line() -> str:
    """As it was typed, but for where its files go."""
    words = ["tandem"]
    typed = iter(sys.argv[1:])
    for word in typed:
        if word.partition("=")[0] not in FOLDERS:
            words.append(word)
        elif "=" not in word:
            next(typed, None)
    return shlex.join(words)
