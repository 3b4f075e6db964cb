"""From what arms did to rows, and from rows to the columns of the field's tables."""

from __future__ import annotations

from bench.eval.decoding import Outcome, Row
from bench.measure import Spread
from bench.speculation.rig import Setup

COLUMNS = (
    *("tokens/s", "ms/token", "rollbacks", "acceptance", "α"),
    *("speed-up", "low…high", "utilization", "same"),
)
REMARK = (
    "Rollbacks: steps in which a draft token was rejected, of all samples. Acceptance: accepted of drafted "
    "tokens; α: of judged ones, up to the first rejected. Speed-up: within rounds, over plain decoding of "
    "the unquantized target."
)
SAME = {True: "yes", False: "NO", None: ""}


def row_of(
    pair: str,
    setup: Setup,
    cell: tuple[int, float],
    sampling: str,
    outcome: Outcome,
    baseline: Outcome,
) -> Row:
    """`cell` is k and τ. Tokens need be the same only where the target is, and decoding is greedy."""
    whole, (k, tau) = outcome.total, cell
    comparable = sampling == "greedy" and setup.target_precision == "none"
    return Row(
        pair=pair,
        draft_precision=setup.draft_precision,
        target_precision=setup.target_precision,
        sampling=sampling,
        k=k,
        tau=tau,
        samples=len(whole.outputs),
        tokens_per_s=whole.tokens_per_s,
        ms_per_token=1e3 / whole.tokens_per_s,
        rollbacks=whole.num_rollbacks,
        acceptance_rate=whole.acceptance_rate,
        alpha=whole.alpha,
        speedup=Spread.of_ratios(outcome.rates, baseline.rates),
        utilization=outcome.utilization,
        identical=whole.outputs == baseline.total.outputs if comparable else None,
    )


def cells_of(row: Row) -> tuple[str, ...]:
    """Of `COLUMNS`; plain decoding has nothing to accept."""
    spread = row.speedup
    accepted = (str(row.rollbacks), f"{row.acceptance_rate:.1%}", f"{row.alpha:.1%}") if row.k else ("",) * 3
    return (
        *(f"{row.tokens_per_s:.1f}", f"{row.ms_per_token:.2f}", *accepted, f"{spread.median:.2f}x"),
        *(f"{spread.low:.2f}…{spread.high:.2f}", f"{row.utilization:.0%}", SAME[row.identical]),
    )
