"""From grades to figures: pass@k, and how far chance reaches."""

from __future__ import annotations

import math

Z_95 = 1.959964


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the unbiased chance that one of k samples passes (Chen et al., 2021, eq. 1).

    Raises `ValueError` if there are fewer samples than k.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise ValueError(f"pass@{k} of {num_passed} in {num_samples}")
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def interval(mean: float, count: int) -> tuple[float, float]:
    """95 % for the mean of `count` scores in [0, 1] (Wilson, 1927).

    Exact figures have the variance of yes and no, mean·(1 - mean); that of shares is smaller, so there it
    is too wide rather than too narrow.
    """
    if not count:
        return 0.0, 1.0
    square = Z_95**2
    middle = (mean + square / (2 * count)) / (1 + square / count)
    half = Z_95 / (1 + square / count) * math.sqrt(mean * (1 - mean) / count + square / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)
