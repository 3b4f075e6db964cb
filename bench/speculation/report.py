"""The results as tables on a terminal, and as CSV, JSON and plots in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.inflate import describe
from bench.measure import Spread, flat, machine, table, write_csv, write_json
from bench.speculation.cells import TEMPERATURE
from bench.speculation.goals import goals
from bench.speculation.rig import Setup
from bench.speculation.runner import OUTPUT_TOKENS, PROMPT_TOKENS, RAW, Options, Results
from bench.speculation.sweep import Row

SWEEP_COLUMNS = (
    *("k", "tau", "tokens/s", "speed-up", "low…high", "T_d", "T_v", "formula", "accepted", "α", "length"),
    *("rollbacks", "tau stops", "draft", "verify", "loop", "same"),
)


def document(results: Results, options: Options) -> dict[str, Any]:
    """Everything as plain values; the keys are stable."""
    return {
        "machine": machine(options.threads),
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "rounds": options.rounds,
        "temperature": TEMPERATURE,
        "quantization": options.quantization,
        "pairs": {name: describe(pair) for name, pair in results.pairs.items()},
        "looping_share": results.looping_share,
        "goals": [asdict(goal) for goal in goals(results, options.large, options.quantization)],
        "rows": [flat(row) for row in results.rows],
        "agreement": [flat(row) for row in results.agreement],
        "quality": [flat(row) for row in results.quality],
        "peers": [flat(row) for row in results.peers],
        "skipped": [flat(row) for row in results.skipped],
    }


def save(folder: Path, content: dict[str, Any]) -> None:
    """`speculation.json` with everything, and a CSV per table."""
    write_json(folder / "speculation.json", content)
    for name in ("rows", "agreement", "quality", "peers"):
        write_csv(folder / f"{name}.csv", content[name])


def show(results: Results, options: Options, console: Console) -> None:
    """All tables, the headline last, where a terminal stops scrolling."""
    _show_setting(results, options, console)
    _show_agreement(results, console)
    _show_quality(results, console)
    for group, rows in groupby(results.rows, key=_group_of):
        _show_group(group, list(rows), console)
    _show_peers(results, console)
    if results.skipped:
        console.print("[bold]not measured[/]")
        for skipped in results.skipped:
            console.print(f"  {skipped.what}: {skipped.why}")
    _show_goals(results, options, console)


def _show_setting(results: Results, options: Options, console: Console) -> None:
    facts = machine(options.threads)
    console.print(
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, {facts['isa']}, "
        f"load {facts['load_before']}; {PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out, "
        f"medians of {options.rounds} rounds, low…high over rounds; target weights: {options.quantization}"
    )
    for name, pair in results.pairs.items():
        how = "as it was trained" if name == RAW else "grown to that cost, computes the same as raw"
        console.print(f"  {name}: {describe(pair)}; {how}")
    console.print(
        f"speed is measured on prompts whose greedy continuation does not end in a loop "
        f"({results.looping_share:.0%} of those tried do); samples are drawn at temperature {TEMPERATURE} "
        "by speculative sampling; T_d and T_v are forwards of the draft and of verification in plain steps\n"
    )


def _show_agreement(results: Results, console: Console) -> None:
    rows = [
        (
            *(row.draft, row.along, f"{row.share:.0%}", str(row.positions)),
            *(f"{row.greedy:.1%}", f"{row.overlap:.1%}", f"{row.same_draw:.1%}", f"{row.modesty:.2f}"),
            f"{row.accepted_of_3:.2f}",
        )
        for row in results.agreement
    ]
    columns = (
        "draft",
        "along",
        "share of texts",
        "positions",
        "same greedy",
        "Σ min",
        "same draw",
        "modesty",
        "accepted of 3",
    )
    console.print(table("how often drafts agree with the target", columns, rows, left=2), "")


def _show_quality(results: Results, console: Console) -> None:
    rows = [
        (row.precision, f"{row.perplexity:.3f}", f"{row.greedy_agreement:.2%}", f"{row.divergence:.2g}")
        for row in results.quality
    ]
    columns = ("precision", "perplexity", "same greedy as fp32", "KL from fp32, nats")
    console.print(table("the target's quality on held-out text", columns, rows), "")


def _group_of(row: Row) -> tuple[Any, ...]:
    return row.pair, row.draft, row.draft_precision, row.target_precision, row.sampling, row.batch


def _show_group(group: tuple[Any, ...], rows: Sequence[Row], console: Console) -> None:
    pair, draft, draft_precision, target_precision, sampling, batch = group
    setup = Setup(draft, draft_precision, target_precision).label
    plain = _rate(rows[0].plain_tokens_per_s)
    title = f"{pair}: {setup}, {sampling}, batch {batch}; plain {plain}"
    console.print(table(title, SWEEP_COLUMNS, [_cells(row) for row in rows], left=0), "")


def _cells(row: Row) -> tuple[str, ...]:
    expected = (row.draft_cost, row.verify_cost, row.predicted_speedup)
    same = {True: "yes", False: "NO", None: ""}[row.identical]
    shares = (row.draft_share, row.verify_share, row.loop_share)
    return (
        *(row.k, f"{row.tau:g}", f"{row.tokens_per_s.median:.1f}", f"{row.speedup.median:.2f}x"),
        f"{row.speedup.low:.2f}…{row.speedup.high:.2f}",
        *("" if value is None else f"{value:.2f}" for value in expected),
        *(f"{row.acceptance_rate:.1%}", f"{row.alpha:.1%}", f"{row.mean_accepted_length:.2f}"),
        *(str(row.rollbacks), str(row.tau_stops), *(f"{share:.0%}" for share in shares), same),
    )


def _rate(spread: Spread) -> str:
    return f"{spread.median:.1f} tokens/s ({spread.low:.1f}…{spread.high:.1f})"


def _show_peers(results: Results, console: Console) -> None:
    rows = [
        (
            *(row.pair, row.system, f"{row.tokens_per_s.median:.1f}"),
            *(f"{row.tandem_ratio.median:.2f}x", f"{row.tandem_ratio.low:.2f}…{row.tandem_ratio.high:.2f}"),
        )
        for row in results.peers
    ]
    if rows:
        columns = ("pair", "system", "tokens/s", "Tandem over it", "low…high")
        console.print(table("whole requests at batch 1, greedy, prompt included", columns, rows, left=2), "")


def _show_goals(results: Results, options: Options, console: Console) -> None:
    rows = [
        (goal.what, goal.where, f"{goal.measured:.2f}x", f"{goal.wanted:.2f}x", "yes" if goal.holds else "NO")
        for goal in goals(results, options.large, options.quantization)
    ]
    columns = ("goal", "at", "measured", "wanted", "holds")
    console.print(table("goals, speed over plain decoding unless it says otherwise", columns, rows, left=2))
