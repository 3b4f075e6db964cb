"""γ study: what γ draft tokens per step bring, beside what theory expects from measured costs, by source.

Ω(γ, α) = (1 - α^(γ+1)) / (1 - α)                         tokens per step (Leviathan, Kalman, Matias 2023)
T_avg / T_T = (γ · T_D / T_T + T_V(γ) / T_T) / Ω(γ, α)    time per token in plain steps
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.eval import published
from bench.eval.attempt import attempt
from bench.eval.decoding import (
    Arm,
    Outcome,
    measure,
    num_runs,
    per_round,
    rig_of,
    sampling_params,
)
from bench.eval.experiment import Chart, Findings, Series, Settings
from bench.eval.models import pair_of
from bench.eval.samples import RULE, Samples, Writer
from bench.eval.texts import Source, sources
from bench.measure import Meter, Sheet, Spread
from bench.speculation.formula import StepCosts, predict, tokens_per_step
from bench.speculation.formula import measure as measure_costs
from bench.speculation.rig import Rig, Setup

NAME = "gamma"
TITLE = "γ study: measured speed-up beside theory"
GAMMAS = (2, 3, 5, 7)
CANDIDATES = range(1, 9)  # of the recommendation
FORMULA = (
    "Expected: Ω(γ, α) / (γ · T_D / T_T + T_V(γ) / T_T) with Ω = (1 − α^(γ+1)) / (1 − α), α of judged "
    "tokens, and forwards timed alone: T_D of the draft, T_T of the target, T_V of the target on γ + 1 "
    "rows. The recommended γ is the best of 1 … 8 by that formula; 0 where none beats plain decoding."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One γ on the samples of one source, greedy, one at a time."""

    pair: str
    source: str
    gamma: int
    samples: int
    alpha: float  # accepted of judged tokens
    acceptance_rate: float  # accepted of drafted tokens
    omega: float  # tokens per step that theory expects
    tokens_per_step: float
    draft_ms: float  # T_D
    target_ms: float  # T_T
    verify_ms: float  # T_V
    expected_speedup: float
    speedup: Spread
    expected_ms_per_token: float
    ms_per_token: float
    recommended: int  # for this source


def recommended(alpha: float, costs: Mapping[int, StepCosts]) -> int:
    """The γ that theory finds fastest; 0 if plain decoding is no slower."""
    best = max(costs, key=lambda gamma: predict(alpha, gamma, costs[gamma]).speed_up)
    return best if predict(alpha, best, costs[best]).speed_up > 1 else 0


def run(settings: Settings) -> Findings:
    """Every source there is, in turns with plain decoding of the same samples."""
    subject = pair_of(settings)
    writer = Writer(settings, subject)
    found = {s.name: (s, writer.samples(s, settings.samples)) for s in sources(settings, subject.pair.target)}
    most = max(len(samples.prompts) for _, samples in found.values())
    room = per_round(most, 1, settings.rounds)
    rig = rig_of(settings, subject.pair, Setup(), room)
    costs = {g: measure_costs(rig.engine.model, rig.engine.draft, 1, g) for g in CANDIDATES}
    runs = sum(
        num_runs(1 + len(GAMMAS), len(samples.prompts), 1, settings.rounds) for _, samples in found.values()
    )
    with Meter(NAME, runs) as meter:
        rows, skipped = attempt(
            found, lambda one: _rows(rig, subject.name, *one, costs, settings, meter), settings, meter
        )
    counts = "; ".join(f"{name}: {samples.count}" for name, (_, samples) in found.items())
    remarks = [f"{subject.label}. {counts}. {RULE}"]
    return Findings(
        tables={"rows": rows},
        sheets=[_sheet(rows), _theirs()],
        charts=_charts(rows),
        remarks=[*remarks, FORMULA, published.GAMMA_SETTING, *skipped],
        published=published.GAMMA,
    )


def _rows(
    rig: Rig,
    pair: str,
    source: Source,
    samples: Samples,
    costs: Mapping[int, StepCosts],
    settings: Settings,
    meter: Meter,
) -> Iterator[Row]:
    arms = {gamma: Arm.of(rig, gamma, 0.0) for gamma in (0, *GAMMAS)}
    found = measure(arms, samples.prompts, 1, sampling_params("greedy"), settings.rounds, meter.step)
    drafted = [found[gamma].total for gamma in GAMMAS]
    accepted, rejected = sum(r.num_accepted for r in drafted), sum(r.num_rollbacks for r in drafted)
    best = recommended(accepted / max(accepted + rejected, 1), costs)
    for gamma in GAMMAS:
        yield _row(pair, source.name, gamma, found[gamma], found[0], costs[gamma], best)


def _row(
    pair: str, source: str, gamma: int, outcome: Outcome, plain: Outcome, costs: StepCosts, best: int
) -> Row:
    whole = outcome.total
    expected = predict(whole.alpha, gamma, costs).speed_up
    return Row(
        pair=pair,
        source=source,
        gamma=gamma,
        samples=len(whole.outputs),
        alpha=whole.alpha,
        acceptance_rate=whole.acceptance_rate,
        omega=tokens_per_step(whole.alpha, gamma),
        tokens_per_step=1 + whole.mean_accepted_length,
        draft_ms=1e3 * costs.draft_s,
        target_ms=1e3 * costs.target_s,
        verify_ms=1e3 * costs.verify_s,
        expected_speedup=expected,
        speedup=Spread.of_ratios(outcome.rates, plain.rates),
        expected_ms_per_token=1e3 * costs.target_s / expected,
        ms_per_token=1e3 / whole.tokens_per_s,
        recommended=best,
    )


def _sheet(rows: Sequence[Row]) -> Sheet:
    lines = [
        (
            *(row.source, str(row.gamma), f"{row.alpha:.1%}", f"{row.acceptance_rate:.1%}"),
            *(f"{row.omega:.2f}", f"{row.tokens_per_step:.2f}"),
            *(f"{row.draft_ms / row.target_ms:.2f}", f"{row.verify_ms / row.target_ms:.2f}"),
            *(f"{row.expected_speedup:.2f}x", f"{row.speedup.median:.2f}x"),
            *(f"{row.speedup.low:.2f}…{row.speedup.high:.2f}", f"{row.expected_ms_per_token:.2f}"),
            *(f"{row.ms_per_token:.2f}", str(row.recommended)),
        )
        for row in rows
    ]
    columns = (
        *("source", "γ", "α", "acceptance", "Ω", "tokens/step", "T_D/T_T", "T_V/T_T", "expected", "speed-up"),
        *("low…high", "expected ms/token", "ms/token", "best γ"),
    )
    return Sheet("γ draft tokens per step, greedy, batch 1", columns, lines, 1)


def _theirs() -> Sheet:
    """Published figures, a column per pair."""
    pairs = tuple(dict.fromkeys(row.pair for row in published.GAMMA))
    cells = {(r.gamma, r.pair): f"{r.speedup:.2f}x, α {r.alpha_percent:.1f}%" for r in published.GAMMA}
    lines = [(str(gamma), *(cells[gamma, pair] for pair in pairs)) for gamma in GAMMAS]
    return Sheet("published: speed-up and α on an A100", ("γ", *pairs), lines, 1)


def _charts(rows: Sequence[Row]) -> list[Chart]:
    by_source = {
        name: [row for row in rows if row.source == name] for name in {row.source: 0 for row in rows}
    }
    speeds = [Series(name, GAMMAS, [r.speedup.median for r in some]) for name, some in by_source.items()]
    expected = [
        Series(f"{name}, expected", GAMMAS, [row.expected_speedup for row in some], is_expected=True)
        for name, some in by_source.items()
    ]
    alphas = [Series(name, GAMMAS, [100 * r.alpha for r in some]) for name, some in by_source.items()]
    title = rows[0].pair if rows else ""
    below = "draft tokens per step, γ"
    return [
        Chart("speedup", f"{title}: greedy, batch 1", below, "speed-up", [*speeds, *expected], level=1.0),
        Chart("alpha", f"{title}: accepted of judged tokens", below, "α, %", alphas),
    ]
