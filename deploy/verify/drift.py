"""How far one set of logits lies from another. Knows tensors by their methods only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Drift:
    """Sums over all places where both were computed."""

    num_places: int = 0  # tokens
    num_same: int = 0  # places with the same most probable token
    num_values: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    is_finite: bool = True

    def add(self, local: Any, other: Any) -> None:
        """Logits of the same places, [places, vocab] each."""
        gaps = (other - local).abs()
        self.num_places += len(local)
        self.num_same += int((local.argmax(-1) == other.argmax(-1)).sum())
        self._add_gaps(gaps)

    def add_chosen(self, logits: Any, token_ids: list[int], logprobs: list[float]) -> None:
        """Greedy choices of others with their log-probabilities, against our `logits` [places, vocab]."""
        for row, token_id, logprob in zip(logits, token_ids, logprobs, strict=True):
            self.num_places += 1
            self.num_same += int(row.argmax()) == token_id
            self._add_gaps((row.log_softmax(-1)[token_id] - logprob).abs())

    @property
    def agreement(self) -> float:
        """The share of places with the same most probable token."""
        return self.num_same / max(self.num_places, 1)

    @property
    def mean_abs(self) -> float:
        return self.sum_abs / max(self.num_values, 1)

    def _add_gaps(self, gaps: Any) -> None:
        self.num_values += gaps.numel()
        self.is_finite = self.is_finite and bool(gaps.isfinite().all())
        self.max_abs = max(self.max_abs, float(gaps.max()))
        self.sum_abs += float(gaps.double().sum())
