"""The packed rows of a ragged batch as the native decoder takes them: one run of int32.

Little is touched per step on purpose: a forward has just driven everything else out of the caches.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from tandem.engine.batch import SequenceRows


class NativeBatch(NamedTuple):
    """Rows of all sequences behind each other, and where each sequence's blocks are.

    `numbers`: rows, sequences, rows of logits, length of all tables; then token ids [rows], positions [rows],
    first rows [sequences + 1], block tables behind each other, where each begins [sequences], rows whose
    logits are wanted (src/model.h).
    """

    numbers: array[int]
    num_rows: int
    num_logits: int
    lowest_token: int
    highest_token: int
    num_positions: int  # no row's position reaches this

    @property
    def padded_rows(self) -> int:
        """Rows that carry no token."""
        return 0

    @classmethod
    def build(
        cls, sequences: Sequence[SequenceRows], block_size: int, num_blocks: int, ahead: int = 0
    ) -> NativeBatch:
        """Order is kept. Tables reach `ahead` positions further, as far as a sequence has blocks.

        ValueError for rows that do not fit their blocks, or blocks that do not exist.
        """
        if not sequences:
            raise ValueError("a forward needs at least one sequence")
        token_ids: list[int] = []
        positions: list[int] = []
        tables: list[int] = []
        first_blocks: list[int] = []
        logits_rows: list[int] = []
        first_rows, last = [0], 0
        for s in sequences:
            count, table = len(s.token_ids), s.block_table
            end = s.start + count
            used = -(-end // block_size)
            if count < 1 or used > len(table):
                raise ValueError(f"rows that end at {end} do not fit in {len(table) * block_size} slots")
            token_ids += s.token_ids
            positions += range(s.start, end)
            first_blocks.append(len(tables))
            tables += table[: -(-(end + ahead) // block_size)]
            stop = first_rows[-1] + count
            first_rows.append(stop)
            logits_rows += range(stop - s.num_logits, stop)
            last = max(last, end)
        if min(tables) < 0 or max(tables) >= num_blocks:
            raise ValueError(f"block ids must be in [0, {num_blocks})")
        counts = (len(token_ids), len(sequences), len(logits_rows), len(tables))
        numbers = array(
            "i", [*counts, *token_ids, *positions, *first_rows, *tables, *first_blocks, *logits_rows]
        )
        return cls(numbers, counts[0], counts[2], min(token_ids), max(token_ids), last + ahead)
