"""Findings as CSV, JSON, Markdown and PNG files, and on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.eval import charts
from bench.eval.experiment import Experiment, Findings, Settings
from bench.measure import flat, machine, table, write_csv, write_json


@dataclass(frozen=True, slots=True)
class Report:
    """An experiment that has run."""

    experiment: Experiment
    settings: Settings
    findings: Findings
    command: str  # that measures it again

    def document(self) -> dict[str, Any]:
        """Everything as plain values; the keys are stable."""
        return {
            "experiment": self.experiment.NAME,
            "title": self.experiment.TITLE,
            "command": self.command,
            "machine": machine(self.settings.threads, self.settings.device),
            "settings": _plain(self.settings),
            **{name: [flat(row) for row in rows] for name, rows in self.findings.tables.items()},
            "published": [flat(row) for row in self.findings.published],
            "remarks": self.findings.remarks,
        }

    def markdown(self, pictures: Sequence[str] = ()) -> str:
        """A chapter of a page; `pictures` as links from where the page will lie."""
        parts = [f"## {self.experiment.TITLE}", f"    {self.command}"]
        for sheet in self.findings.sheets:
            parts += [f"**{sheet.title}**", sheet.markdown()]
        if self.findings.remarks:
            parts.append("\n".join(f"- {remark}" for remark in self.findings.remarks))
        parts += [f"![{Path(picture).stem}]({picture})" for picture in pictures]
        return "\n\n".join(parts) + "\n"

    def save(self, folder: Path, with_plots: bool) -> list[Path]:
        """Write all files into the folder, made if need be; they are returned."""
        stem = self.experiment.NAME
        written = [folder / f"{stem}.json", folder / f"{stem}.md"]
        write_json(written[0], self.document())
        for name, rows in self.findings.tables.items():
            written.append(folder / (f"{stem}.csv" if name == "rows" else f"{stem}-{name}.csv"))
            write_csv(written[-1], [flat(row) for row in rows])
        drawn = list(charts.draw(folder, stem, self.findings.charts)) if with_plots else []
        written[1].write_text(self.markdown([file.name for file in drawn]))
        return written + drawn

    def show(self, console: Console) -> None:
        """All tables, then what is to be known about them."""
        for sheet in self.findings.sheets:
            console.print(table(*sheet), "")
        for remark in self.findings.remarks:
            console.print(remark)


def _plain(settings: Settings) -> dict[str, Any]:
    """Without the deadline, which is of this run only."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    del values["deadline_s"]
    texts = [str(path) for path in settings.texts]
    paths = {name: str(values[name]) if values[name] else None for name in ("target", "draft")}
    return values | paths | {"texts": texts}
