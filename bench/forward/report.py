"""The results as tables: on a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from bench.forward.cells import Cell, Timing
from bench.forward.results import Results
from bench.forward.traffic import Traffic, Work
from bench.measure import Sheet, table

GOAL = 1.3  # of the slope over the limit


def work_of(cell: Cell, traffic: Traffic) -> Work:
    """What a cell must read and compute."""
    if cell.phase == "decode":
        return traffic.decode(cell.batch, cell.tokens)
    return traffic.prefill(cell.tokens, cell.batch)


def sheets(results: Results) -> Iterator[Sheet]:
    """All tables."""
    for title, phase, tokens in (("decode step", "decode", "context"), ("prefill", "prefill", "prompt")):
        columns = ("batch", tokens, "ms", "tokens/s", "of memory", "of arithmetic")
        yield Sheet(title, columns, list(_timings(results, phase)), 0)
    yield Sheet(
        "whole outputs of one sequence",
        ("prompt", "output tokens", "with a cache, ms", "without, ms", "without / with"),
        list(_outputs(results)),
        0,
    )
    yield Sheet(
        "beside transformers, eager",
        ("phase", "batch", "tokens", "Tandem, ms", "transformers, ms", "transformers / Tandem"),
        list(_beside(results)),
        1,
    )


def remarks(results: Results) -> Iterator[str]:
    """The machine, the slope, and what was not measured."""
    found, options, growth = results.limits, results.options, results.slope
    yield (
        f"{options.shape} on {options.device}, {options.threads} threads, {results.engine}. This machine: "
        f"{found.bytes_per_s / 1e9:.1f} GB/s, {found.flops / 1e9:.0f} GFLOP/s (fp32)."
    )
    if growth:
        verdict = "within" if growth.over_limit <= GOAL else "above"
        yield (
            f"Slope of a decode step over total context: {1e6 * growth.seconds_per_token:.2f} µs per token, "
            f"{growth.over_limit:.2f} times what reading its KV takes ({1e6 * growth.limit_s:.2f} µs): "
            f"{verdict} the goal of {GOAL}."
        )
    for skip in results.skipped:
        cell = skip.cell
        yield f"Not measured: {cell.phase}, batch {cell.batch}, {cell.tokens} tokens: {skip.why}."


def show(results: Results, console: Console) -> None:
    """Everything on the terminal."""
    for sheet in sheets(results):
        console.print(table(*sheet))
    for remark in remarks(results):
        console.print(remark)


def markdown(results: Results) -> str:
    """Everything as one page."""
    parts = [f"# What a forward costs: {results.options.shape}", *remarks(results)]
    for sheet in sheets(results):
        parts += [f"## {sheet.title}", sheet.markdown()]
    return "\n\n".join(parts) + "\n"


def _timings(results: Results, phase: str) -> Iterator[tuple[str, ...]]:
    for timing in results.timings:
        if timing.cell.phase == phase:
            yield _timing(timing, results)


def _timing(timing: Timing, results: Results) -> tuple[str, ...]:
    cell, seconds = timing.cell, timing.seconds
    work = work_of(cell, results.traffic)
    tokens = cell.batch * (cell.tokens if cell.phase == "prefill" else 1)
    return (
        str(cell.batch),
        str(cell.tokens),
        f"{1e3 * seconds.median:.2f} ({1e3 * seconds.low:.2f}…{1e3 * seconds.high:.2f})",
        f"{tokens / seconds.median:.0f}",
        f"{100 * work.memory_share(seconds.median, results.limits):.0f} %",
        f"{100 * work.arithmetic_share(seconds.median, results.limits):.0f} %",
    )


def _outputs(results: Results) -> Iterator[tuple[str, ...]]:
    found = {(o.prompt, o.output_tokens, o.cache): o.seconds for o in results.outputs}
    for prompt, count, cache in found:
        if cache:
            with_s, without_s = found[prompt, count, True], found.get((prompt, count, False))
            rest = (f"{1e3 * without_s:.1f}", f"{without_s / with_s:.1f}") if without_s else ("too long", "")
            yield str(prompt), str(count), f"{1e3 * with_s:.1f}", *rest


def _beside(results: Results) -> Iterator[tuple[str, ...]]:
    for row in results.beside:
        yield (
            row.cell.phase,
            str(row.cell.batch),
            str(row.cell.tokens),
            f"{1e3 * row.ours.median:.2f}",
            f"{1e3 * row.theirs.median:.2f}",
            f"{row.ratio.median:.2f} ({row.ratio.low:.2f}…{row.ratio.high:.2f})",
        )
