"""Which combinations are measured: a subset that fits a quarter of an hour, or all of them.

Cells that share what is loaded, the batch and the way of sampling form a group: they take turns with one
another and with plain decoding of the same prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.speculation.rig import Setup
from tandem.quantizations import AUTO as DEFAULT

K = (1, 2, 3, 5, 7)
AUTO = 0  # k by what pays
TAU = (0.0001, 0.2, 0.4)
BATCHES = (1, 2, 4, 8, 16)
PRECISIONS = ("none", "int8", "nf4", "int4")  # of a draft, beside what it takes by itself
TEMPERATURE = 0.7
TAU_OFF = TAU[0]

MODEL = Setup(draft_precision=DEFAULT)  # as a service has it where nobody says otherwise
NGRAM = Setup(draft="ngram")
SELF = tuple(Setup(draft="self", draft_precision=precision) for precision in ("nf4", "int8", "int4"))
QSPEC = tuple(Setup(draft="qspec", target_precision=precision) for precision in ("nf4", "int4"))
DRAFTS = tuple(Setup(draft_precision=precision) for precision in PRECISIONS)
STORED_DRAFT = DRAFTS[0]


@dataclass(frozen=True, slots=True)
class Cell:
    """How far ahead is drafted: k tokens (AUTO: what pays), until the draft is less sure than tau."""

    k: int
    tau: float = TAU_OFF

    @property
    def label(self) -> str:
        k = "auto" if self.k == AUTO else str(self.k)
        return f"k={k} tau={self.tau:g}"


@dataclass(frozen=True, slots=True)
class Group:
    """Measured in turns, on `num_prompts` prompts, `batch` at a time; a batch's tail is smaller than it."""

    pair: str
    setup: Setup
    batch: int
    sampling: str  # greedy | sampled
    cells: tuple[Cell, ...] = field(default=())
    num_prompts: int = 4

    @classmethod
    def filled(cls, pair: str, setup: Setup, batch: int, sampling: str, cells: tuple[Cell, ...]) -> Group:
        """With prompts enough that the batch is full for most of the time."""
        return cls(pair, setup, batch, sampling, cells, max(4, batch * (3 if batch <= 4 else 2)))

    @property
    def label(self) -> str:
        return f"{self.pair}: {self.setup.label}, {self.sampling}, batch {self.batch}"


def _at(*ks: int, tau: float = TAU_OFF) -> tuple[Cell, ...]:
    return tuple(Cell(k, tau) for k in ks)


def designed(large: str, raw_draft: str, raw: str) -> list[Group]:
    """What matters most comes first, so that a slow machine leaves out the least.

    `large` is the grown pair, `raw_draft` the grown target with the draft as it was trained, and `raw` the
    pair as it was trained.
    """
    return [*_headline(large), *_smaller_draft(raw_draft), *_further(large, raw), *_variants(large)]


def _headline(large: str) -> Iterator[Group]:
    """Every k at batch 1, what pays in a batch, and thresholds."""
    thresholds = tuple(Cell(k, tau) for tau in TAU[1:] for k in (3, 5, 7))
    yield Group(large, MODEL, 1, "greedy", _at(*K, AUTO) + thresholds)
    yield Group.filled(large, MODEL, 4, "greedy", _at(1, 2, 3, AUTO))
    yield Group.filled(large, STORED_DRAFT, 4, "greedy", _at(1, AUTO))
    yield Group.filled(large, MODEL, 16, "greedy", _at(1, 3, AUTO))


def _smaller_draft(pair: str) -> Iterator[Group]:
    """A draft that costs next to nothing: further ahead, and in fuller batches."""
    yield Group.filled(pair, MODEL, 1, "greedy", _at(3, 5, 7, AUTO))
    yield Group.filled(pair, MODEL, 4, "greedy", _at(1, 2, 3, AUTO))
    yield Group.filled(pair, MODEL, 16, "greedy", _at(1, AUTO))


def _further(large: str, raw: str) -> Iterator[Group]:
    """The pair as it was trained, samples, and the other batches."""
    for batch in (1, 4, 16):
        yield Group.filled(raw, MODEL, batch, "greedy", _at(1, 3, 5, AUTO))
    yield Group(large, MODEL, 1, "sampled", _at(1, 3, 5, AUTO))
    yield Group.filled(large, MODEL, 2, "greedy", _at(1, 3, 5, AUTO))
    yield Group.filled(large, MODEL, 8, "greedy", _at(1, 3, AUTO))


def _variants(large: str) -> Iterator[Group]:
    """Other drafts and precisions, and sampling in a batch."""
    for setup in (NGRAM, *SELF, *QSPEC):
        yield Group(large, setup, 1, "greedy", _at(3, AUTO), 2)
    for setup in DRAFTS:  # on the prompts of the headline, to be set beside it
        yield Group(large, setup, 1, "greedy", _at(3, AUTO))
    yield Group.filled(large, MODEL, 8, "sampled", _at(3, AUTO))


def everything(pairs: tuple[str, ...]) -> list[Group]:
    """The whole product: hours."""
    setups = (MODEL, NGRAM, *SELF, *QSPEC, *DRAFTS)
    cells = tuple(Cell(k, tau) for k in (*K, AUTO) for tau in TAU)
    product = itertools.product(pairs, setups, BATCHES, ("greedy", "sampled"))
    return [Group.filled(*chosen, cells) for chosen in product]
