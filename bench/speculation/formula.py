"""The speed-up that theory expects (Leviathan, Kalman, Matias 2023), from measured costs and acceptance.

(1 - α^(k+1)) / (1 - α)   tokens per step, over
k · T_draft / T_target + T_verify(k + 1) / T_target   cost of a step in plain steps
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.engine.costs import measure_costs
from tandem.engine.model_runner import ModelRunner


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of one forward for a batch: the draft's, the target's, and the target's on k + 1 rows each."""

    draft_s: float
    target_s: float
    verify_s: float


def measure(target: ModelRunner, draft: ModelRunner | None, batch: int, k: int) -> StepCosts:
    """Overwrites the cache's first blocks. Without a draft model drafting costs nothing."""
    rows = (batch, batch * (k + 1))
    target_s, verify_s = measure_costs(target, rows).seconds
    draft_s = measure_costs(draft, rows[:1], depth=k).seconds[0] if draft else 0.0
    return StepCosts(draft_s, target_s, verify_s)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What theory expects of a cell."""

    draft_cost: float  # T_draft / T_target
    verify_cost: float  # T_verify(k + 1) / T_target
    speed_up: float


def predict(alpha: float, k: int, costs: StepCosts) -> Prediction:
    """Of k draft tokens, each accepted with probability `alpha` if all before it are."""
    draft_cost, verify_cost = costs.draft_s / costs.target_s, costs.verify_s / costs.target_s
    return Prediction(draft_cost, verify_cost, tokens_per_step(alpha, k) / (k * draft_cost + verify_cost))


def tokens_per_step(alpha: float, k: int) -> float:
    """Expected with acceptance rate `alpha` per draft token."""
    return k + 1.0 if alpha >= 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
