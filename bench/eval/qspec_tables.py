"""What the QSpec experiment finds, as rows, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.eval import published
from bench.eval.experiment import Chart, Series
from bench.measure import Sheet, Spread

BASELINE = "W4A16"


@dataclass(frozen=True, slots=True)
class Throughput:
    """A method at a batch size."""

    target: str
    method: str
    batch: int
    tokens_per_s: float
    speedup: Spread  # over W4A16, within rounds
    acceptance_rate: float | None  # of drafted tokens; None where nothing is drafted, and so below
    draft_share: float | None  # of wall time
    verify_share: float | None
    utilization: float
    identical: bool  # tokens of W4A16


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of a width of the draft's activations, with γ draft tokens per step."""

    target: str
    draft: str
    gamma: int
    acceptance_rate: float
    alpha: float
    tokens_per_step: float
    draft_share: float
    verify_share: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What a width thinks of held-out text."""

    target: str
    method: str
    perplexity: float
    agreement: float  # greedy, with W4A16
    agreement_16_bit: float


def sheets(
    rows: Sequence[Throughput], by_gamma: Sequence[Acceptance], fidelity: Sequence[Fidelity]
) -> list[Sheet]:
    """All three, and the published fidelity."""
    return [_throughput(rows), _acceptance(by_gamma), _fidelity(fidelity), _theirs()]


def _throughput(rows: Sequence[Throughput]) -> Sheet:
    lines = []
    for row in rows:
        parts = (row.acceptance_rate, row.draft_share, row.verify_share)
        is_qspec = row.acceptance_rate is not None
        lines.append(
            (
                *(row.method, str(row.batch), f"{row.tokens_per_s:.1f}", f"{row.speedup.median:.2f}x"),
                *(f"{row.speedup.low:.2f}…{row.speedup.high:.2f}", f"{row.utilization:.0%}"),
                *("" if part is None else f"{part:.0%}" for part in parts),
                *("yes" if row.identical else "no", _published(row.batch) if is_qspec else ""),
            )
        )
    columns = ("method", "batch", "tokens/s", "over W4A16", "low…high", "utilization", "acceptance")
    return Sheet("throughput", (*columns, "draft", "verify", "same", "published, 3B to 13B"), lines, 1)


def _published(batch: int) -> str:
    found = [row.speedup for row in published.QSPEC if row.batch == batch]
    return f"{min(found):.2f}…{max(found):.2f}x"


def _acceptance(rows: Sequence[Acceptance]) -> Sheet:
    lines = [
        (
            *(row.draft, str(row.gamma), f"{row.acceptance_rate:.1%}", f"{row.alpha:.1%}"),
            *(f"{row.tokens_per_step:.2f}", f"{row.draft_share:.0%}", f"{row.verify_share:.0%}"),
        )
        for row in rows
    ]
    columns = ("draft", "γ", "acceptance", "α", "tokens/step", "draft", "verify")
    return Sheet("acceptance by γ, batch 8 (published: about 70 % at γ = 7)", columns, lines, 1)


def _fidelity(rows: Sequence[Fidelity]) -> Sheet:
    lines = [
        (row.method, f"{row.perplexity:.3f}", f"{row.agreement:.2%}", f"{row.agreement_16_bit:.2%}")
        for row in rows
    ]
    columns = ("method", "perplexity", "same choice as W4A16", "as 16-bit")
    return Sheet("fidelity (QSpec's is W4A16's: the tokens are the same)", columns, lines, 1)


def _theirs() -> Sheet:
    lines = [
        (row.formats, row.figure, f"{row.w4a16:g}", f"{row.qspec:g}", f"{row.w4a4:g}")
        for row in published.FIDELITY
    ]
    return Sheet("published fidelity", ("formats", "figure", "W4A16", "QSpec", "W4A4"), lines, 2)


def charts(target: str, rows: Sequence[Throughput], by_gamma: Sequence[Acceptance]) -> list[Chart]:
    """Speed by batch beside the published one; acceptance by γ."""
    methods = dict.fromkeys(row.method for row in rows if row.method != BASELINE)
    speeds = [
        Series(
            method,
            [f"batch {row.batch}" for row in rows if row.method == method],
            [row.speedup.median for row in rows if row.method == method],
        )
        for method in methods
    ]
    theirs = [row for row in published.QSPEC if row.model == "Llama 3 8B"]
    places = [f"batch {row.batch}" for row in theirs]
    speeds.append(Series("QSpec, Llama 3 8B, published", places, [r.speedup for r in theirs], True))
    drafts = dict.fromkeys(row.draft for row in by_gamma)
    accepted = [
        Series(
            f"{draft} drafts",
            [row.gamma for row in by_gamma if row.draft == draft],
            [100 * row.acceptance_rate for row in by_gamma if row.draft == draft],
        )
        for draft in drafts
    ]
    return [
        Chart("speed", f"{target}: speed over W4A16", "", "ratio", speeds, is_bars=True, level=1.0),
        Chart("acceptance", f"{target}: accepted of drafted tokens", "γ", "%", accepted),
    ]
