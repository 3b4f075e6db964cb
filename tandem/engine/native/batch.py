"""The packed rows of a ragged batch as the native decoder takes them: flat int32 arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt

from tandem.engine.batch import SequenceRows

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """Rows of all sequences behind each other, and where each sequence's blocks are."""

    token_ids: Ints  # [rows]
    positions: Ints  # [rows]
    first_rows: Ints  # [sequences + 1]
    tables: Ints  # block tables behind each other
    first_blocks: Ints  # [sequences]
    logits_rows: Ints  # [num_logits]
    num_positions: int  # no row's position reaches this

    padded_rows = 0  # rows that carry no token

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @classmethod
    def build(
        cls, sequences: Sequence[SequenceRows], block_size: int, num_blocks: int, ahead: int = 0
    ) -> NativeBatch:
        """Order is kept. Tables reach `ahead` positions further, as far as a sequence has blocks.

        ValueError for rows that do not fit their blocks, or blocks that do not exist.
        """
        if not sequences:
            raise ValueError("a forward needs at least one sequence")
        lens = [len(s.token_ids) for s in sequences]
        ends = [s.start + count for s, count in zip(sequences, lens, strict=True)]
        used = [-(-end // block_size) for end in ends]
        if min(lens) < 1 or any(n > len(s.block_table) for n, s in zip(used, sequences, strict=True)):
            capacity = [len(s.block_table) * block_size for s in sequences]
            raise ValueError(f"{lens} rows that end at {ends} do not fit in {capacity} slots")
        if ahead:
            reach = [-(-(end + ahead) // block_size) for end in ends]
            used = [min(n, len(s.block_table)) for n, s in zip(reach, sequences, strict=True)]
        tables = np.fromiter(
            chain.from_iterable(s.block_table[:n] for n, s in zip(used, sequences, strict=True)), np.int32
        )
        if tables.min() < 0 or tables.max() >= num_blocks:
            raise ValueError(f"block ids must be in [0, {num_blocks})")
        first_rows = [0, *accumulate(lens)]
        spans = [range(end - count, end) for end, count in zip(ends, lens, strict=True)]
        wanted = [range(stop - s.num_logits, stop) for s, stop in zip(sequences, first_rows[1:], strict=True)]
        return cls(
            token_ids=np.fromiter(chain.from_iterable(s.token_ids for s in sequences), np.int32),
            positions=np.fromiter(chain.from_iterable(spans), np.int32),
            first_rows=np.array(first_rows, np.int32),
            tables=tables,
            first_blocks=np.array([0, *accumulate(used)][:-1], np.int32),
            logits_rows=np.fromiter(chain.from_iterable(wanted), np.int32),
            num_positions=max(ends) + ahead,
        )
