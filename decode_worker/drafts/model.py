"""A separate, smaller model that drafts. Its KV lives in a cache of its own under the same block ids.

The draft reads what it has missed (a new sequence's prompt, accepted tokens) in bounded pieces, so a
long prompt delays no running sequence: until the draft has caught up, the sequence decodes plainly.
What it knows of a sequence is one number, the tokens in its cache; a rejection lowers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decode_worker.drafts.draft import Proposal
from decode_worker.sequence import DecodeSequence
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.engine.rng import Stream
from tandem.engine.sampler import draw, process_logits
from tandem.speculation import MAX_ASSISTANT_TOKENS

CATCH_UP_ROWS = 256  # prompt tokens the draft reads per step, over all sequences


class ModelDraft:
    """Drafts with a model of the target's vocabulary."""

    def __init__(self, model: ModelRunner, threshold: float = 0.0) -> None:
        self._model = model
        self._default_threshold = threshold
        self._num_computed: dict[DecodeSequence, int] = {}  # tokens whose KV is in the draft's cache

    def propose(self, sequences: Sequence[DecodeSequence], counts: Sequence[int]) -> list[Proposal]:
        proposals = [Proposal() for _ in sequences]
        wanted = {s: (p, n) for s, p, n in zip(sequences, proposals, counts, strict=True) if n > 0}
        drafting = self._catch_up(list(wanted))
        if not drafting:
            return proposals
        logits = self._model.forward(self._model.batch([self._missing(s) for s in drafting]))
        while drafting:
            for sequence in drafting:
                self._num_computed[sequence] = len(sequence.token_ids) + len(wanted[sequence][0].token_ids)
            sure = self._draw(logits, drafting, [wanted[s][0] for s in drafting])
            drafting = [s for s in sure if len(wanted[s][0].token_ids) < wanted[s][1]]
            if drafting:
                guesses = [self._last_guess(s, wanted[s][0]) for s in drafting]
                logits = self._model.forward(self._model.batch(guesses))
        for sequence, (proposal, _) in wanted.items():
            sequence.sampling.rollback(len(proposal.token_ids))
        return proposals

    def settle(self, sequence: DecodeSequence) -> None:
        """Keep the KV of tokens that stand; the newest token was never fed to the draft."""
        known = self._num_computed.get(sequence, 0)
        self._num_computed[sequence] = min(known, len(sequence.token_ids) - 1)

    def leave(self, sequence: DecodeSequence) -> None:
        self._num_computed.pop(sequence, None)

    def _catch_up(self, sequences: list[DecodeSequence]) -> list[DecodeSequence]:
        """Read what new sequences bring, within the step's budget; returns those that are up to date."""
        budget = CATCH_UP_ROWS
        behind, rows = [], []
        for sequence in sequences:
            known = self._num_computed.setdefault(sequence, 0)
            missing = len(sequence.token_ids) - known
            if missing <= MAX_ASSISTANT_TOKENS + 1:  # what one step may have added
                continue
            behind.append(sequence)
            count = min(missing - 1, budget)
            if count:
                token_ids = sequence.token_ids[known : known + count]
                rows.append(SequenceRows(token_ids, known, sequence.blocks, num_logits=0))
                self._num_computed[sequence] += count
                budget -= count
        if rows:
            self._model.forward(self._model.batch(rows))
        return [s for s in sequences if s not in behind]

    def _missing(self, sequence: DecodeSequence) -> SequenceRows:
        known = self._num_computed[sequence]
        return SequenceRows(sequence.token_ids[known:], known, sequence.blocks)

    @staticmethod
    def _last_guess(sequence: DecodeSequence, proposal: Proposal) -> SequenceRows:
        start = len(sequence.token_ids) + len(proposal.token_ids) - 1
        return SequenceRows(proposal.token_ids[-1:], start, sequence.blocks)

    def _draw(
        self, logits: Any, sequences: list[DecodeSequence], proposals: list[Proposal]
    ) -> list[DecodeSequence]:
        """One guess per row, by the same rule the target's token will be chosen by.

        Returns the sequences that go on. Where the draft gives no token the request's threshold, no
        guess is made: that is decided before the draw, so it changes no distribution.
        """
        states = [sequence.sampling for sequence in sequences]
        scores = process_logits(logits, states)
        probs = scores.double().softmax(-1)
        token_ids = scores.argmax(-1)
        for stream in (Stream.TOKEN, Stream.DRAFT):
            rows = [i for i, s in enumerate(sequences) if s.draft_stream is stream]
            if rows:
                token_ids[rows] = draw(scores[rows], [states[i] for i in rows], stream)
        confidence = probs.amax(-1).tolist()
        going_on = []
        for i, (sequence, token_id) in enumerate(zip(sequences, token_ids.tolist(), strict=True)):
            if confidence[i] < self._threshold(sequence):
                continue
            if sequence.draft_stream is Stream.DRAFT:
                proposals[i].probs.append(probs[i].cpu().numpy())
            proposals[i].token_ids.append(token_id)
            sequence.sampling.append(token_id)
            going_on.append(sequence)
        return going_on

    def _threshold(self, sequence: DecodeSequence) -> float:
        asked = sequence.work.speculation.assistant_confidence_threshold
        return self._default_threshold if asked is None else asked
