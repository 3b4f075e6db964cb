"""What a run leaves: JSON with every request, CSV with a row each, one HTML page, a table on the terminal."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.measure import table, write_csv, write_json
from bench.serve import plots
from bench.serve.page import FORMULAS, describe, limits_of, page
from bench.serve.protocol import sentence
from bench.serve.record import RequestRecord
from bench.serve.scrape import Scraper
from bench.serve.search import Found
from bench.serve.session import Options, Run
from tandem.errors import ConfigError

NAME = "serve"
FORMAT = 2  # of `serve.json`; one of another version has other figures


def document(
    run: Run, options: Options, target: str, model: str, found: Found | None = None
) -> dict[str, Any]:
    """Everything that is written; the same run gives the same page."""
    return {
        "kind": "tandem bench serve",
        "format": FORMAT,
        "began": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "target": target,
        "model": model,
        "options": options.to_json(),
        "summary": run.summary,
        **({"search": asdict(found)} if found else {}),
        **({"server": _server(run.scraper)} if run.scraper else {}),
        "records": [record.to_json() for record in run.records],
    }


def save(folder: Path, content: dict[str, Any]) -> list[Path]:
    """`serve.json`, `serve.csv`, `serve.html`, and PNG pictures where there is matplotlib to draw them.

    The folder is made if need be. Returns the pictures.
    """
    records = [RequestRecord.from_json(values) for values in content["records"]]
    write_json(folder / f"{NAME}.json", content)
    stages = sorted({name for record in records for name in record.stages_ms})
    write_csv(folder / f"{NAME}.csv", [_row(record, stages) for record in records])
    (folder / f"{NAME}.html").write_text(page(content, records), encoding="utf-8")
    return list(plots.draw(folder, content, records)) if importlib.util.find_spec("matplotlib") else []


def load(path: Path) -> dict[str, Any]:
    """A saved run, by its file or its folder. Raises `ConfigError` if it is none."""
    file = path / f"{NAME}.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text())
        if content["kind"] != "tandem bench serve":
            raise ValueError(content["kind"])
        written = content.get("format")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file} is no load test's result: no such file; give the --out of a `tandem bench serve`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no load test's result ({type(error).__name__}: {error})") from error
    if written != FORMAT:
        raise ConfigError(f"{file} is of another version of tandem: run the load test again")
    return dict(content)


def show(content: dict[str, Any], console: Console) -> None:
    """The figures as a table, and what to make of them."""
    summary = content["summary"]
    columns = ("p50", "p90", "p99", "mean", "count")
    rows = [
        [name, *(_cell(summary[key][column]) for column in columns)] for key, (name, _) in FORMULAS.items()
    ]
    console.print(f"[bold]{content['model']}[/]: {describe(content['options'])}")
    console.print(table("", ("ms", *columns), rows))
    console.print(
        f"{summary['ok']} of {summary['requests']} answered, {summary['errors']} failed, "
        f"{summary['cancelled']} cancelled in {summary['duration_s']:.1f} s; "
        f"{summary['output_tokens_per_s']:.0f} output tokens/s, goodput {summary['goodput_rps']:.2f} req/s"
    )
    for name, one in summary["classes"].items():
        met = "–" if one["attainment"] is None else f"{one['attainment']:.1%}"
        console.print(
            f"{name or 'others'}: {one['ok']} of {one['requests']} answered, {met} within the limits "
            f"({limits_of(name, content['options'])}), goodput {one['goodput_rps']:.2f} req/s"
        )
    for reason, count in summary["errors_by_reason"].items():
        console.print(f"[yellow]{count} × {reason}[/]")
    if summary.get("cut"):
        console.print(
            f"[yellow]{summary['cut']} requests were cut to the model's context: the file has longer ones[/]"
        )
    if summary["client_bottleneck"]:
        console.print("[yellow]the client was the bottleneck: its own lag at p99 is over 10 ms[/]")
    if protocols := content.get("protocol"):
        console.print(sentence(protocols))
    if found := content.get("search"):
        low, high = found["goodput_ci"]
        console.print(
            f"holds {_cell(found['holding_rate'])} req/s, fails at {_cell(found['failing_rate'])}; "
            f"goodput {found['goodput_rps']:.2f} req/s (95 %: {low:.2f} to {high:.2f})"
        )
        if num_late := sum(trial["client_bottleneck"] for trial in found["trials"]):
            console.print(
                f"[yellow]the client was the bottleneck in {num_late} of {len(found['trials'])} trials[/]"
            )


def _server(scraper: Scraper) -> dict[str, Any]:
    return {
        "url": scraper.url,
        "failed": scraper.num_failed,
        "readings": [asdict(reading) for reading in scraper.readings],
    }


def headline(content: dict[str, Any]) -> dict[str, Any]:
    """The stable keys of `--json`."""
    return {**content["summary"], **{key: content[key] for key in ("search", "protocol") if key in content}}


def _row(record: RequestRecord, stages: Sequence[str]) -> dict[str, Any]:
    """One request as a flat row."""
    values = record.to_json()
    return {
        **{name: value for name, value in values.items() if name not in ("arrivals", "stages_ms")},
        "num_arrivals": len(record.arrivals),
        "ttft_ms": record.ttft_ms,
        "ttft_sent_ms": record.ttft_sent_ms,
        "tpot_ms": record.tpot_ms,
        "e2e_ms": record.e2e_ms,
        **{name: record.stages_ms.get(name) for name in stages},
    }


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
