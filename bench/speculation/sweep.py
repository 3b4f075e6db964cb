"""Speed of every cell against plain decoding of the same prompts, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bench.measure import Spread, interleave
from bench.speculation import formula
from bench.speculation.cells import AUTO, TAU_OFF, TEMPERATURE, Cell, Group
from bench.speculation.rig import EXACT, Rig, Run
from bench.speculation.text import Tokens
from decode_worker.decoder import Decoder
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, SpeculationPolicy

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Row:
    """One cell. Rates are output tokens per second of decoding alone; shares are of wall time."""

    pair: str
    draft: str
    draft_precision: str
    target_precision: str
    sampling: str
    batch: int
    k: str
    tau: float
    tokens_per_s: Spread
    plain_tokens_per_s: Spread
    speedup: Spread  # within rounds
    draft_cost: float | None  # T_draft / T_target, by timed forwards; None where the number drafted varies
    verify_cost: float | None  # T_verify(k + 1) / T_target
    predicted_speedup: float | None  # by the formula, from these and α
    acceptance_rate: float  # accepted of drafted tokens
    alpha: float  # accepted of judged tokens, those up to the first rejected one
    mean_accepted_length: float
    rollbacks: int  # per run
    tau_stops: int  # per run
    draft_share: float
    verify_share: float
    loop_share: float
    identical: bool | None  # to plain decoding's tokens; None for samples, which are other draws


def measure(
    rig: Rig,
    group: Group,
    prompts: Sequence[Tokens],
    output_tokens: int,
    rounds: int,
    after: Callable[[], None],
) -> list[Row]:
    """All cells of a group. `after` is called `num_runs(group, rounds)` times."""
    temperature = 0.0 if group.sampling == "greedy" else TEMPERATURE
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=temperature)
    costs = {
        cell: formula.measure(rig.engine.model, rig.engine.draft, group.batch, cell.k)
        for cell in group.cells
        if cell.k != AUTO and cell.tau == TAU_OFF
    }
    decoders: list[tuple[str, Decoder, SpeculationParams]] = [
        (PLAIN, rig.plain, EXACT),
        *((cell.label, rig.auto() if cell.k == AUTO else rig.constant, _asked(cell)) for cell in group.cells),
    ]
    rig.prefill(prompts)

    def run(decoder: Decoder, asked: SpeculationParams, some: Sequence[Tokens]) -> Run:
        result = rig.run(decoder, some, group.batch, sampling, asked)
        after()
        return result

    for _, decoder, asked in decoders:
        run(decoder, asked, prompts[: group.batch])  # caches warm, and k settled where it varies
    arms = {name: partial(run, decoder, asked, prompts) for name, decoder, asked in decoders}
    measured = interleave(arms, rounds, warm_ups=0)
    return [_row(group, cell, measured[cell.label], measured[PLAIN], costs.get(cell)) for cell in group.cells]


def _asked(cell: Cell) -> SpeculationParams:
    """The cell as a request's own controls; samples are accepted by speculative sampling."""
    return SpeculationParams(
        policy=SpeculationPolicy.AUTO,
        num_assistant_tokens=None if cell.k == AUTO else cell.k,
        assistant_confidence_threshold=cell.tau,
    )


def num_runs(group: Group, rounds: int) -> int:
    """Of decoders, the warm-ups included."""
    return (1 + len(group.cells)) * (1 + rounds)


def _row(
    group: Group, cell: Cell, runs: Sequence[Run], plain: Sequence[Run], costs: formula.StepCosts | None
) -> Row:
    rates, plain_rates = [run.tokens_per_s for run in runs], [run.tokens_per_s for run in plain]
    last = runs[-1]  # counts repeat from round to round, except where k follows the measured costs
    expected = formula.predict(last.alpha, cell.k, costs) if costs else None
    draft_share, verify_share = last.draft_s / last.seconds, last.verify_s / last.seconds
    return Row(
        pair=group.pair,
        draft=group.setup.draft,
        draft_precision=group.setup.draft_precision,
        target_precision=group.setup.target_precision,
        sampling=group.sampling,
        batch=group.batch,
        k="auto" if cell.k == AUTO else str(cell.k),
        tau=cell.tau,
        tokens_per_s=Spread.of(rates),
        plain_tokens_per_s=Spread.of(plain_rates),
        speedup=Spread.of_ratios(rates, plain_rates),
        draft_cost=expected.draft_cost if expected else None,
        verify_cost=expected.verify_cost if expected else None,
        predicted_speedup=expected.speed_up if expected else None,
        acceptance_rate=last.acceptance_rate,
        alpha=last.alpha,
        mean_accepted_length=last.mean_accepted_length,
        rollbacks=last.num_rollbacks,
        tau_stops=last.num_tau_stops,
        draft_share=draft_share,
        verify_share=verify_share,
        loop_share=1 - draft_share - verify_share,
        identical=all(r.outputs == plain[0].outputs for r in runs) if group.sampling == "greedy" else None,
    )
