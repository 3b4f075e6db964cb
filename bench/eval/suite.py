"""All experiments within a time, and the page that they fill."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from bench.eval.catalog import MODULES, experiment
from bench.eval.experiment import Settings
from bench.eval.report import Report
from bench.measure import machine
from tandem.errors import ConfigError

WEIGHTS: Mapping[str, float] = {  # of the time that is left
    "speculation": 2,
    "quantized-pairs": 2,
    "quantization": 2,
    "gamma": 2,
    "qspec": 3,
    "quality": 1,
    "forward": 3,
    "split": 5,
}
PACKAGES = ("tandem-serve", "torch", "transformers", "numpy", "grpcio")
CHECKOUT = Path(__file__).resolve().parents[2]


class Suite:
    """One run over all experiments; what an earlier one leaves of its time goes to the later ones."""

    def __init__(self, settings: Settings, minutes: float, command: str) -> None:
        self._settings, self._minutes, self._command = settings, minutes, command
        self._skipped: list[str] = []
        self.reports: list[Report] = []

    def run(self) -> Iterator[Report]:
        """Each experiment's report, as it ends."""
        end_s = time.monotonic() + 60 * self._minutes
        for name in MODULES:
            left_s = end_s - time.monotonic()
            settings = replace(self._settings, deadline_s=time.monotonic() + share_of(name) * left_s)
            chosen = experiment(name)
            try:
                report = Report(chosen, settings, chosen.run(settings), command_of(name, settings))
            except ConfigError as error:
                self._skipped.append(f"{chosen.TITLE}: {error}")
                continue
            self.reports.append(report)
            yield report

    def write(self, page: Path) -> None:
        """Machine, versions, seeds and commands, then everything that was found."""
        page.parent.mkdir(parents=True, exist_ok=True)
        chapters = [report.markdown().strip() for report in self.reports]
        missing = [f"Not measured: {why}" for why in self._skipped]
        page.write_text("\n\n".join(["# Results", *self._setting(), *chapters, *missing]) + "\n")

    def _setting(self) -> tuple[str, str]:
        facts = machine(self._settings.threads, self._settings.device)
        gpu = f", {facts['gpu']} ({self._settings.device})" if "gpu" in facts else ""
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        return (
            f"Written by `{self._command}`; `docs/experiments.md` says what is measured and how. Samples are "
            "few: the command above each table measures it again, and takes more.",
            f"- machine: {facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB, "
            f"{facts['isa']}, {facts['threads']} threads{gpu}; load at the end: {facts['load_before']}\n"
            f"- versions: Python {facts['python']}, {versions}\n"
            "- seeds: samples are chosen by their place in the text; the seed of a sample is its number in "
            "its round; arrivals and synthetic prompts have seed 0",
        )


def share_of(name: str) -> float:
    """Of the time that is left when an experiment begins."""
    names = list(MODULES)
    return WEIGHTS[name] / sum(WEIGHTS[later] for later in names[names.index(name) :])


def command_of(name: str, settings: Settings) -> str:
    """That measures one experiment with these settings."""
    words = ["tandem", "eval", name]
    if settings.target is None:
        words += ["--shape", settings.shape]
    for option, value in (("--target", settings.target), ("--draft", settings.draft)):
        words += [option, str(value)] if value else []
    words += ["--device", settings.device] if settings.device != "cpu" else []
    for path in settings.texts:
        words += ["--text", str(path)]
    return shlex.join([*words, "--samples", str(settings.samples), "--rounds", str(settings.rounds)])


def default_page(out: Path) -> Path:
    """In the documentation of a checkout; beside the other files of an installed package."""
    folder = CHECKOUT / "docs" if (CHECKOUT / "pyproject.toml").exists() else out
    return folder / "results.md"
