"""How many threads a worker's step thread computes with, and on which cores, from step to step.

The result of a forward does not depend on it, so it may change between any two.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol

import torch

from tandem.config import CoresConfig
from tandem.cores import (
    Claims,
    Member,
    move_compute_threads,
    name_compute_thread,
    share_of,
    usable_cores,
)

log = logging.getLogger(__name__)


class Cores(Protocol):
    """Owned by the step thread."""

    num_cores: int  # threads of the last step
    name: str  # of the cores that are shared with others of the same name; empty: with nobody known

    def take(self) -> None:
        """A step comes now."""
        ...

    def rest(self) -> None:
        """There is nothing to compute."""
        ...


class OwnCores:
    """Always as many threads as were set at load, wherever the machine runs them."""

    name = ""

    def __init__(self, threads: int) -> None:
        self.num_cores = threads

    def take(self) -> None:
        """Nothing changes."""

    def rest(self) -> None:
        """Nothing changes."""


class SharedCores:
    """A share of the machine's cores, or all of them while no other worker computes.

    A worker that begins moves the threads of those who compute off its share at once, in the middle of
    their step; they go on with fewer threads from the next one. Whoever rests is noticed at the others' next
    step.
    """

    def __init__(self, claims: Claims, cores: list[int]) -> None:
        self.num_cores = len(cores)
        self.name = claims.name
        self._claims = claims
        self._cores = cores
        self._others: frozenset[Member] | None = None  # as this worker's threads were placed; None: it rests
        self._is_named = False

    def take(self) -> None:
        others = self._others
        if is_new := others is None:
            self._claims.begin()
        while (now := self._claims.others()) != others:  # again if somebody came or went meanwhile
            others = now
            self._place(others, is_new=is_new)
        self._others = others

    def rest(self) -> None:
        if self._others is not None:
            self._others = None
            self._claims.end()

    def _place(self, others: frozenset[Member], *, is_new: bool) -> None:
        number = self._claims.number
        computing = {number, *(other.number for other in others)}
        if is_new:
            for other in others:
                if other.pid:
                    move_compute_threads(other.pid, share_of(other.number, computing, self._cores))
        if not self._is_named:
            name_compute_thread()
            self._is_named = True
        mine = share_of(number, computing, self._cores)
        if os.sched_getaffinity(0) != mine:  # this thread's, and so all the others': they are moved together
            move_compute_threads(os.getpid(), mine)
        torch.set_num_threads(len(mine))
        self.num_cores = len(mine)


def cores_of(config: CoresConfig, threads: int) -> Cores:
    """The cores of a worker whose settings ask for so many threads, 0 for a share of them.

    Raises `ConfigError` if the claims file cannot be used.
    """
    path = config.claims
    if threads or path is None:
        return OwnCores(threads or 1)
    cores = usable_cores()
    if not cores:
        log.warning("cores cannot be shared here, as the kernel chooses them: one thread per worker")
        return OwnCores(1)
    return SharedCores(Claims(path), cores)
