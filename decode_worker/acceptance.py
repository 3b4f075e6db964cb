"""Which draft tokens stand, and what comes after them. Pure functions over one sequence's rows.

    draft token      proposed for one position by the draft
    accepted         a draft token that the target's own rule would have produced, or allows
    recovered token  drawn from the residual where the first draft token was rejected
    bonus token      drawn from the target's last row when every draft token was accepted

`match` serves greedy decoding and the `exact` policy, where the target's token at each position is
fixed by its own rule: greedy, or a draw with the numbers that belong to (seed, position). The others
are speculative sampling (Leviathan, Kalman, Matias 2023; Chen et al. 2023): its output has exactly the
target's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Probs = npt.NDArray[np.floating]
TINY = 1e-12  # residual mass below this is rounding: target and draft agree


def match(draft_ids: Sequence[int], target_ids: Sequence[int]) -> int:
    """How many draft tokens equal the target's tokens at the same positions, from the first on."""
    for position, (draft_id, target_id) in enumerate(zip(draft_ids, target_ids, strict=False)):
        if draft_id != target_id:
            return position
    return min(len(draft_ids), len(target_ids))


def point(token_id: int, like: Probs) -> Probs:
    """The distribution of a draft that was sure: all of it on one token."""
    probs = np.zeros_like(like)
    probs[token_id] = 1.0
    return probs


def is_accepted(draft_id: int, draft_probs: Probs, target_probs: Probs, chance: float) -> bool:
    """Accept with probability min(1, target / draft); `chance` is uniform in [0, 1).

    `draft_probs` `[vocab]` is the distribution the token was drawn from. A token that it says cannot
    have been drawn is rejected, and so is anything that is not a probability.
    """
    drawn_with = draft_probs[draft_id]
    return bool(drawn_with > 0 and chance * drawn_with < target_probs[draft_id])


def residual(draft_probs: Probs, target_probs: Probs) -> Probs:
    """The distribution of the recovered token: max(target − draft, 0), normalized.

    Where nothing is left, because both are equal up to rounding, it is the target's own.
    """
    rest = np.maximum(target_probs - draft_probs, 0.0)
    mass = rest.sum()
    return rest / mass if np.isfinite(mass) and mass > TINY else target_probs


def draw(probs: Probs, waits: npt.NDArray[np.float64]) -> int:
    """The token that comes first where each waits for `waits` [vocab] over its probability."""
    return int((probs / waits).argmax())
