"""What a run leaves: JSON with every answer, CSV with a row for each, Markdown, a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench.measure import Sheet, table, write_csv, write_json
from bench.quality.published import published
from bench.quality.run import Item, Results

if TYPE_CHECKING:
    from bench.quality.perplexity import Perplexity  # and with it torch

NAME = "quality"


def document(results: Results | Perplexity, options: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Everything that is written."""
    return {
        "kind": "tandem quality",
        "began": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model": model,
        "options": {name: _plain(value) for name, value in options.items()},
        **asdict(results),
        "published": [asdict(one) for one in published(results.task)],
    }


def save(folder: Path, results: Results | Perplexity, content: Mapping[str, Any]) -> None:
    """`quality.json`, `quality.csv` and `quality.md` in the folder, which is made if need be."""
    write_json(folder / f"{NAME}.json", content)
    rows = content["items"] if isinstance(results, Results) else content["windows"]
    write_csv(folder / f"{NAME}.csv", rows)
    (folder / f"{NAME}.md").write_text(markdown(results, content), encoding="utf-8")


def show(results: Results | Perplexity, content: Mapping[str, Any], console: Console) -> None:
    """Everything but the answers, on the terminal."""
    for sheet in sheets(results, str(content["model"])):
        console.print(table(*sheet))
    if isinstance(results, Results):
        for why, count in reasons(results.items)[:5]:
            console.print(f"[dim]{count} × {why}[/]")


def markdown(results: Results | Perplexity, content: Mapping[str, Any]) -> str:
    """The same as a page."""
    options = ", ".join(f"{name} {value}" for name, value in content["options"].items() if value is not None)
    parts = [f"# {results.task}: {content['model']}", f"{content['began']}. {options}."]
    for sheet in sheets(results, str(content["model"])):
        parts += [f"## {sheet.title}", sheet.markdown()]
    return "\n\n".join(parts) + "\n"


def sheets(results: Results | Perplexity, model: str) -> Iterator[Sheet]:
    """Our figures, and those that others published."""
    title = f"{results.task}, {model}"
    yield _scores(title, results) if isinstance(results, Results) else _perplexity(title, results)
    if theirs := others(results.task):
        yield theirs


def others(task: str) -> Sheet | None:
    """What was published of a task, if anything was."""
    found = published(task)
    if not found:
        return None
    title = f"{task} as published: other models, other machines"
    lines = [(one.source, one.model, one.setting, one.figure) for one in found]
    return Sheet(title, ("source", "model", "setting", "figure"), lines, 3)


def _scores(title: str, results: Results) -> Sheet:
    columns = ("setting", "metric", "problems", "samples", "score", "95 % interval")
    rows = [
        (
            *(row.setting, row.metric, str(row.problems), str(row.samples)),
            *(f"{row.score:.3f}", f"{row.low:.3f} to {row.high:.3f}"),
        )
        for row in results.rows
    ]
    return Sheet(title, columns, rows, 2)


def _perplexity(title: str, results: Perplexity) -> Sheet:
    columns = ("tokens scored", "window", "stride", "nats per token", "perplexity")
    counts = (results.tokens, results.max_length, results.stride)
    figures = (*(f"{count:,}" for count in counts), f"{results.nats:.4f}", f"{results.perplexity:.3f}")
    return Sheet(title, columns, [figures], 0)


def reasons(items: Sequence[Item]) -> list[tuple[str, int]]:
    """Why answers failed, the most frequent first. Of an error only its kind counts."""
    kinds = [item.why.partition(":")[0] for item in items if item.why]
    counted = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return sorted(counted.items(), key=lambda pair: -pair[1])


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
