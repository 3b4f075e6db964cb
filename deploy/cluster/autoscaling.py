"""Serve's autoscaling of each side by the router's books (router/balance.py), not by Serve's own requests.

Every worker replica reports what the router says of both sides; the policies run in Serve's controller,
which averages the reports over `look_back_period_s`, and applies its delays and bounds to the answer.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ray.serve.config import AutoscalingContext

from router.balance import Demand, Targets, decode_wanted, prefill_wanted

Decision = tuple[float, dict[str, Any]]  # replicas, and a state that we do not need


class PrefillPolicy:
    """So many replicas that each has `queued_tokens` prompt tokens waiting."""

    def __init__(self, queued_tokens: int = Targets().queued_tokens) -> None:
        self._targets = Targets(queued_tokens=queued_tokens)

    def __call__(self, context: AutoscalingContext) -> Decision:
        demand = demand_of(context)
        return (prefill_wanted(demand, self._targets) if demand else context.target_num_replicas), {}


class DecodePolicy:
    """So many replicas that each has `occupancy` of its KV blocks given out, and more while a larger share
    of tokens than `late_share` comes later than `router.itl_limit_s` after the one before."""

    def __init__(
        self, occupancy: float = Targets().occupancy, late_share: float = Targets().late_share
    ) -> None:
        self._targets = Targets(occupancy=occupancy, late_share=late_share)

    def __call__(self, context: AutoscalingContext) -> Decision:
        demand = demand_of(context)
        return (decode_wanted(demand, self._targets) if demand else context.target_num_replicas), {}


def demand_of(context: AutoscalingContext) -> Demand | None:
    """What the replicas reported: all speak of one router, and in a rise the highest mean is the newest.

    None before the first report.
    """
    reported = context.aggregated_metrics or {}
    names = [field.name for field in fields(Demand)]
    if not all(reported.get(name) for name in names):
        return None
    return Demand(**{name: max(reported[name].values()) for name in names})


def with_policy(role: str, autoscaling: dict[str, Any]) -> dict[str, Any]:
    """Serve's `autoscaling_config` with our policy and pace where the operator names none."""
    name = "PrefillPolicy" if role == "prefill" else "DecodePolicy"
    ours = {
        "policy": {"policy_function": f"{__name__}:{name}"},
        "metrics_interval_s": 1.0,
        "look_back_period_s": 10.0,
    }
    return {**ours, **autoscaling}
