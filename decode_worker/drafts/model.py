"""A separate, smaller model that drafts. Its KV lies in a cache of its own under the same block ids.

The draft reads what it has missed (a new sequence's prompt, tokens of plain steps) in bounded pieces, so a
long prompt delays no running sequence: until the draft has caught up, the sequence decodes plainly. Where the
prefill worker has read the prompt for the draft, its KV came with the target's.
What it knows of a sequence is one number, the tokens in its cache; a rejection lowers it.
"""

from __future__ import annotations

import time

from decode_worker.drafts.autoregressive import AutoregressiveDraft
from decode_worker.sequence import DecodeSequence
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.speculation import MAX_ASSISTANT_TOKENS

CATCH_UP_ROWS = 256  # prompt tokens the draft reads per step, over all sequences
AT_ONCE = MAX_ASSISTANT_TOKENS + 1  # tokens a guess may begin with: what one step may have added


class ModelDraft(AutoregressiveDraft):
    """Drafts with a model of the target's vocabulary."""

    def __init__(self, model: ModelRunner, threshold: float = 0.0) -> None:
        super().__init__(model, threshold)
        self._num_computed: dict[DecodeSequence, int] = {}  # tokens whose KV is in the draft's cache

    def num_unread(self, sequence: DecodeSequence) -> int:
        missing = self._num_missing(sequence)
        return 0 if missing <= AT_ONCE else missing

    def settle(self, sequence: DecodeSequence) -> None:
        """Keep the KV of tokens that stand; the newest token was never fed to the draft."""
        known = self._num_computed.get(sequence)
        if known is not None:
            self._num_computed[sequence] = min(known, len(sequence.token_ids) - 1)

    def leave(self, sequence: DecodeSequence) -> None:
        self._num_computed.pop(sequence, None)

    def _ready(self, sequences: list[DecodeSequence]) -> list[DecodeSequence]:
        """Read what new sequences bring, within the step's budget; returns those that are up to date."""
        budget = CATCH_UP_ROWS
        ready, rows = [], []
        for sequence in sequences:
            missing = self._num_missing(sequence)
            known = self._num_computed[sequence] = len(sequence.token_ids) - missing
            if missing <= AT_ONCE:
                ready.append(sequence)
                continue
            count = min(missing - 1, budget)
            if count:
                token_ids = sequence.token_ids[known : known + count]
                rows.append(SequenceRows(token_ids, known, sequence.blocks, num_logits=0))
                self._num_computed[sequence] += count
                budget -= count
        if rows:
            began_s = time.perf_counter()
            self._model.forward(self._model.batch(rows))
            self.catch_up_s += time.perf_counter() - began_s
        return ready

    def _num_missing(self, sequence: DecodeSequence) -> int:
        return len(sequence.token_ids) - self._num_computed.get(sequence, sequence.num_draft_computed)

    def _first_rows(self, sequence: DecodeSequence) -> SequenceRows:
        known = self._num_computed[sequence]
        return SequenceRows(sequence.token_ids[known:], known, sequence.blocks)

    def _computed(self, sequence: DecodeSequence, num_tokens: int) -> None:
        self._num_computed[sequence] = num_tokens
