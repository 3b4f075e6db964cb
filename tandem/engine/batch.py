"""One forward pass as packed ragged rows: which token stands where, and who attends to what.

There is no batch dimension. A sequence contributes the rows it adds (a prompt chunk: many, decode: 1,
verification of k drafts: k + 1), all sequences lie behind each other in `[1, total_rows]`, and every
index that attention needs is built here once, not per layer. Knows token ids and block tables, no model.

A sequence is one of three kinds, by what it needs from attention:

    decode   one row, or few on top of a cache: sequences are batched, rows of one share its context
    fresh    a prompt (chunk) with nothing in the cache     start == 0: needs no gather from the cache
    chunk    many rows on top of `start` cached tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tandem.engine.draw import Probs
from tandem.engine.paged_cache import PagedCache

KV_TILE = 64  # decode attention pads each context to a multiple of this many tokens
ROW_MULTIPLE = 4  # query rows of an attention product come in multiples of this many
MAX_DECODE_ROWS = 16  # more rows than this on top of a cache count as a prompt chunk
MAX_PADDING = 0.25  # prompts of one padded group differ from the longest by at most this share

Ints = npt.NDArray[np.int64]


class SequenceRows(NamedTuple):
    """The new rows of one sequence in a forward. `start` tokens are already in the cache.

    A tuple, as each step makes one or two for each sequence.
    """

    token_ids: Sequence[int] | Ints
    start: int
    block_table: Sequence[int]
    num_logits: int = 1  # logits are wanted for this many last rows; 0 for a chunk that is not the last

    @property
    def is_decode(self) -> bool:
        rows = len(self.token_ids)
        return rows == 1 or (self.start > 0 and (rows == self.num_logits or rows <= MAX_DECODE_ROWS))


class Guess(NamedTuple):
    """What a model would go on with, most probable or drawn token by token."""

    token_ids: list[int]
    is_unsure: bool  # it ended because the next token was not probable enough
    probs: list[Probs]  # what each was drawn from; of draws for a draft only


@dataclass(slots=True)
class DecodeRows:
    """Sequences whose rows are few: each gathers its context once, and its rows share it."""

    rows: torch.Tensor | None  # [sequences, most_rows] int64 in the packed batch; None: all rows, in order
    real: torch.Tensor | None  # [sequences, most_rows] bool; padding repeats the first row; None: no padding
    context_lens: torch.Tensor  # [sequences, most_rows] int64: tokens each row sees, itself included
    gather_index: torch.Tensor  # [2 · sequences · kv_heads · blocks] for `PagedCache.gather`
    padded_len: int  # tokens gathered per sequence
    _biases: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, kv_heads: int, group: int, dtype: torch.dtype) -> torch.Tensor:
        """`[sequences · kv_heads, most_rows · group, padded, or 1, padded_len]`: 0 to look, -inf to hide."""
        if window not in self._biases:
            contexts = self.context_lens[:, :, None]
            position = torch.arange(self.padded_len, device=contexts.device)
            hidden = position >= contexts
            if window is not None:
                hidden |= position < contexts - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            bias.masked_fill_(hidden, float("-inf"))
            if bias.shape[1] > 1:
                bias = pad_rows(bias.repeat_interleave(group, 1))
            self._biases[window] = bias.repeat_interleave(kv_heads, 0)
        return self._biases[window]


@dataclass(frozen=True, slots=True)
class FreshGroup:
    """Prompts of similar length, attended together: padded on the right to the longest."""

    rows: torch.Tensor  # [prompts, longest] int64 into the packed batch; padding repeats the first row
    real: torch.Tensor | None  # [prompts, longest] bool; None if nothing is padded
    length: int


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """One prompt chunk on top of cached tokens."""

    first_row: int
    num_rows: int
    start: int
    gather_index: torch.Tensor  # [2 · kv_heads · blocks] for `PagedCache.gather`; whole tiles


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Everything one forward needs besides the weights and the cache."""

    token_ids: torch.Tensor  # [1, rows] int64
    positions: torch.Tensor  # [1, rows] int64
    slot_mapping: torch.Tensor  # [rows] int64
    new_blocks: torch.Tensor | None  # [n] int64: blocks that get their first but not their last token now
    cu_seqlens: Ints  # [sequences + 1] row ranges of the sequences
    context_lens: Ints  # [sequences] tokens in the cache after this forward
    logits_indices: torch.Tensor  # [num_logits_rows] int64
    decode: DecodeRows | None
    fresh: tuple[FreshGroup, ...]
    chunks: tuple[ChunkRows, ...]
    padded_rows: int  # rows of the padded attention groups that carry no token
    biases: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)  # what attention reuses

    @property
    def num_rows(self) -> int:
        return self.slot_mapping.shape[0]

    def clear_new_blocks(self, cache: PagedCache) -> None:
        """Zero what these rows start: whole blocks are gathered, and nothing stale may be among them."""
        if self.new_blocks is not None:
            cache.clear(self.new_blocks)

    @classmethod
    def build(
        cls,
        sequences: Sequence[SequenceRows],
        cache: PagedCache,
    ) -> ForwardBatch:
        """Lay the sequences out behind each other and index them. Order is kept."""
        if not sequences:
            raise ValueError("a forward needs at least one sequence")
        layout, device = _Layout(sequences, cache.block_size), cache.device
        fresh, padded_rows = _fresh_groups(sequences, layout, device)
        return cls(
            token_ids=_to(
                np.concatenate([np.asarray(s.token_ids, np.int64) for s in sequences])[None], device
            ),
            positions=_to(layout.positions[None], device),
            slot_mapping=_to(layout.slots_of(layout.sequence_of_row, layout.positions), device),
            new_blocks=_new_blocks(layout, device),
            cu_seqlens=layout.cu_seqlens,
            context_lens=layout.starts + layout.lens,
            logits_indices=_to(_logits_indices(sequences, layout), device),
            decode=_decode_rows(sequences, layout, cache),
            fresh=fresh,
            chunks=_chunks(sequences, layout, cache),
            padded_rows=padded_rows,
        )


class _Layout:
    """Row ranges, positions and block tables of all sequences as arrays."""

    def __init__(self, sequences: Sequence[SequenceRows], block_size: int) -> None:
        self.block_size = block_size
        self.lens = np.array([len(s.token_ids) for s in sequences], np.int64)
        self.starts = np.array([s.start for s in sequences], np.int64)
        self.cu_seqlens = np.concatenate(([0], np.cumsum(self.lens)))
        rows = int(self.cu_seqlens[-1])
        self.sequence_of_row = np.repeat(np.arange(len(sequences)), self.lens)
        self.positions = np.arange(rows) + (self.starts - self.cu_seqlens[:-1])[self.sequence_of_row]
        self.block_tables = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), np.int64)
        for table, sequence in zip(self.block_tables, sequences, strict=True):
            table[: len(sequence.block_table)] = sequence.block_table
        self._check(sequences)

    def _check(self, sequences: Sequence[SequenceRows]) -> None:
        capacity = np.array([len(s.block_table) for s in sequences]) * self.block_size
        if (self.lens < 1).any() or (self.starts + self.lens > capacity).any():
            raise ValueError(f"rows {self.lens} after {self.starts} do not fit in {capacity} slots")

    def slots_of(self, sequence: Ints, position: Ints) -> Ints:
        """The cache slot of each (sequence, position); the two broadcast."""
        block: Ints = self.block_tables[sequence, position // self.block_size]
        return block * self.block_size + position % self.block_size

    def padded_rows(self, sequence: Ints, length: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Packed rows `[n, length]` of these sequences, the first repeated as padding, and which are real."""
        real = np.arange(length) < self.lens[sequence][:, None]
        return self.cu_seqlens[sequence][:, None] + np.where(real, np.arange(length), 0), real

    def whole_tiles(self, sequence: Ints, contexts: Ints, zero_block: int) -> Ints:
        """`[n, blocks]`: the blocks of each context, then the zero block up to whole tiles of the longest."""
        padded_len = -(-int(contexts.max()) // KV_TILE) * KV_TILE
        index = np.arange(padded_len // self.block_size)
        owned = self.block_tables[sequence][:, np.minimum(index, self.block_tables.shape[1] - 1)]
        return np.where(index * self.block_size < contexts[:, None], owned, zero_block)


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """`[..., rows, n]` with zero rows up to a multiple of `ROW_MULTIPLE`; a zero bias hides nothing."""
    padding = -x.shape[-2] % ROW_MULTIPLE
    return F.pad(x, (0, 0, 0, padding)) if padding else x


def _to(array: npt.NDArray[np.generic], device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def _logits_indices(sequences: Sequence[SequenceRows], layout: _Layout) -> Ints:
    ends = layout.cu_seqlens[1:]
    return np.concatenate(
        [np.arange(end - s.num_logits, end) for s, end in zip(sequences, ends, strict=True)]
    )


def _new_blocks(layout: _Layout, device: torch.device) -> torch.Tensor | None:
    ends = layout.starts + layout.lens
    last_start = (ends - 1) // layout.block_size * layout.block_size
    new = np.flatnonzero((last_start >= layout.starts) & (ends % layout.block_size != 0))
    return _to(layout.block_tables[new, last_start[new] // layout.block_size], device) if new.size else None


def _decode_rows(sequences: Sequence[SequenceRows], layout: _Layout, cache: PagedCache) -> DecodeRows | None:
    chosen = np.array([i for i, s in enumerate(sequences) if s.is_decode], np.int64)
    if not chosen.size:
        return None
    lens = layout.lens[chosen]
    rows, real = layout.padded_rows(chosen, int(lens.max()))
    in_order = len(chosen) == len(sequences) and real.all()
    blocks = layout.whole_tiles(chosen, layout.starts[chosen] + lens, cache.zero_block)
    return DecodeRows(
        rows=None if in_order else _to(rows, cache.device),
        real=None if real.all() else _to(real, cache.device),
        context_lens=_to(layout.positions[rows] + 1, cache.device),
        gather_index=cache.head_block_index(_to(blocks, cache.device)),
        padded_len=blocks.shape[1] * cache.block_size,
    )


def _fresh_groups(
    sequences: Sequence[SequenceRows], layout: _Layout, device: torch.device | str
) -> tuple[tuple[FreshGroup, ...], int]:
    fresh = [i for i, s in enumerate(sequences) if not s.is_decode and s.start == 0]
    fresh.sort(key=lambda i: -layout.lens[i])
    groups: list[FreshGroup] = []
    padded_rows = 0
    while fresh:
        longest = int(layout.lens[fresh[0]])
        members = [i for i in fresh if layout.lens[i] >= (1 - MAX_PADDING) * longest]
        fresh = fresh[len(members) :]
        rows, real = layout.padded_rows(np.array(members), longest)
        padding = int(real.size - real.sum())
        padded_rows += padding
        groups.append(FreshGroup(_to(rows, device), _to(real, device) if padding else None, longest))
    return tuple(groups), padded_rows


def _chunks(sequences: Sequence[SequenceRows], layout: _Layout, cache: PagedCache) -> tuple[ChunkRows, ...]:
    chunks = []
    for i, s in enumerate(sequences):
        if s.start == 0 or s.is_decode:
            continue
        context = np.array([s.start + len(s.token_ids)])
        blocks = layout.whole_tiles(np.array([i]), context, cache.zero_block)
        index = cache.head_block_index(_to(blocks, cache.device))
        chunks.append(ChunkRows(int(layout.cu_seqlens[i]), len(s.token_ids), s.start, index))
    return tuple(chunks)
