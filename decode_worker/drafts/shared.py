"""The target's own weights, quantized, as the draft: it reads and writes the target's KV blocks.

Nothing to prefill, to transfer or to catch up on: the KV of every token that stands is the target's, and
the KV the draft leaves for its guesses lies in slots that the verifying forward of the same step overwrites
before anybody reads them (QSpec, Zhao et al. 2024). What verification does not reach, because the draft
failed half-way, lies behind the last computed token and is overwritten by the steps to come.
"""

from __future__ import annotations

from decode_worker.drafts.autoregressive import AutoregressiveDraft
from decode_worker.sequence import DecodeSequence
from tandem.engine.batch import SequenceRows


class SharedDraft(AutoregressiveDraft):
    """Its model runs over the target's cache. Keeps nothing per sequence."""

    def _first_rows(self, sequence: DecodeSequence) -> SequenceRows:
        return sequence.rows()
