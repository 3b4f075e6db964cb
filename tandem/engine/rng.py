"""Random numbers that depend on (seed, position, stream) and on nothing else.

A counter-based generator: no state to save, restore or share, so a request draws the same numbers in
any batch, on any worker, after any crash. The mixing function is the finalizer of splitmix64
(Steele, Lea, Flood 2014), applied once per key word.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SEED_BITS = (1 << 64) - 1


class Stream(IntEnum):
    """What a number is drawn for. Draws of different streams at one position are independent."""

    TOKEN = 0  # the token itself, from the target's distribution
    DRAFT = 1  # a draft token, from the draft's distribution
    ACCEPT = 2  # whether a draft token is accepted
    RESIDUAL = 3  # the token that replaces a rejected one


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seeds: Sequence[int], positions: Sequence[int], stream: Stream) -> npt.NDArray[np.uint64]:
    x = np.array([seed & SEED_BITS for seed in seeds], np.uint64)
    for word in (np.array(positions, np.uint64), np.uint64(stream)):
        x = _mix((x ^ word) + _GOLDEN)
    return x


def uniforms(
    seeds: Sequence[int], positions: Sequence[int], stream: Stream = Stream.TOKEN
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position), with 53 random bits."""
    return (_mix(_keys(seeds, positions, stream) + _GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def exponentials(
    seeds: Sequence[int], positions: Sequence[int], stream: Stream, count: int
) -> npt.NDArray[np.float64]:
    """`[rows, count]` numbers above 0 with mean 1, exponentially distributed, for each (seed, position).

    Divided by weights, the smallest one is at index i with the probability of weight i (the Gumbel-max
    trick). They do not depend on the weights: similar distributions mostly draw the same index, with a
    probability of at least (1 - d) / (1 + d) at a total variation distance of d (Daliri et al. 2024).
    """
    x = _keys(seeds, positions, stream)[:, None] ^ np.arange(count, dtype=np.uint64)
    uniform = ((_mix(x + _GOLDEN) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log1p(-uniform)
