"""Prompt lookup: if the last tokens occurred before, guess that what followed them follows again.

No model and no memory beyond the token ids (prompt lookup decoding, Saxena 2023). Good where outputs
repeat their input: edits, quotes, code.
"""

from __future__ import annotations

from collections.abc import Sequence

from decode_worker.drafts.draft import Proposal
from decode_worker.sequence import DecodeSequence
from tandem.profiling.spans import traced

MAX_NGRAM = 4
MIN_NGRAM = 2


class _Index:
    """For each n-gram, the position after its latest occurrence that has a successor."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        """Index occurrences that end before the last token, so that each has a successor."""
        for end in range(max(self._num_indexed, MIN_NGRAM), len(token_ids)):
            for length in range(MIN_NGRAM, min(MAX_NGRAM, end) + 1):
                self._after[tuple(token_ids[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))

    def find(self, token_ids: Sequence[int]) -> int | None:
        """Where the longest known n-gram at the end of `token_ids` goes on."""
        for length in range(min(MAX_NGRAM, len(token_ids)), MIN_NGRAM - 1, -1):
            position = self._after.get(tuple(token_ids[-length:]))
            if position is not None:
                return position
        return None


class NgramDraft:
    """One index per running sequence; work per step does not grow with its length."""

    catch_up_s = 0.0

    def __init__(self) -> None:
        self._indexes: dict[DecodeSequence, _Index] = {}

    @traced("draft")
    def propose(
        self, sequences: Sequence[DecodeSequence], counts: Sequence[int], worth: float = 0.0
    ) -> list[Proposal]:
        return [self._propose(sequence, count) for sequence, count in zip(sequences, counts, strict=True)]

    def num_unread(self, sequence: DecodeSequence) -> int:
        """To index a prompt takes no time that counts."""
        return 0

    def settle(self, sequence: DecodeSequence) -> None:
        """Nothing to forget: only tokens that stand are indexed."""

    def leave(self, sequence: DecodeSequence) -> None:
        self._indexes.pop(sequence, None)

    def _propose(self, sequence: DecodeSequence, count: int) -> Proposal:
        index = self._indexes.setdefault(sequence, _Index())
        token_ids = sequence.token_ids
        index.extend(token_ids)
        position = index.find(token_ids) if count else None
        return Proposal([] if position is None else list(token_ids[position : position + count]))
