"""Drafting token by token: what a separate draft model and the target's own quantized weights share.

All sequences draft together, one forward per depth; a sequence leaves when it has its number or when the
draft is unsure. Under greedy decoding and the `exact` policy a guess is chosen by the very rule the target's
token will be chosen by, with the same random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decode_worker.drafts.draft import Proposal
from decode_worker.sequence import DecodeSequence
from tandem.engine.batch import SequenceRows
from tandem.engine.draw import Draw
from tandem.engine.model_runner import ModelRunner
from tandem.engine.rng import Stream
from tandem.engine.sampler import draw, process_logits

MODESTY = 0.5  # a token of probability p is the target's about p ** MODESTY of the time (docs/performance.md)

Wanted = dict[DecodeSequence, tuple[Proposal, int]]  # what to fill, and with how many tokens


class AutoregressiveDraft:
    """Subclasses say which rows a sequence's first forward takes, and what stays in the cache."""

    def __init__(self, model: ModelRunner, threshold: float = 0.0) -> None:
        self._model = model
        self._default_threshold = threshold
        self._least_product = 0.0  # of the step that runs
        self.catch_up_s = 0.0

    def propose(
        self, sequences: Sequence[DecodeSequence], counts: Sequence[int], worth: float = 0.0
    ) -> list[Proposal]:
        self._least_product = worth ** (1 / MODESTY)
        proposals = [Proposal() for _ in sequences]
        wanted = {s: (p, n) for s, p, n in zip(sequences, proposals, counts, strict=True) if n > 0}
        drafting = self._ready(list(wanted))
        if drafting and self._model.can_guess and all(s.is_guessable for s in drafting):
            self._guess(drafting, wanted)
        else:
            self._step_by_step(drafting, wanted)
        return proposals

    def _guess(self, drafting: list[DecodeSequence], wanted: Wanted) -> None:
        """All depths in one call: nothing but a choice stands between them."""
        rows = [self._first_rows(sequence) for sequence in drafting]
        thresholds = [self._threshold(sequence) for sequence in drafting]
        counts, draws = [wanted[s][1] for s in drafting], _draws_of(drafting)
        products = [self._least(sequence) for sequence in drafting]
        guesses = self._model.guess(rows, counts, thresholds, draws, products)
        for sequence, guess in zip(drafting, guesses, strict=True):
            proposal = wanted[sequence][0]
            proposal.token_ids, proposal.probs = guess.token_ids, guess.probs
            proposal.is_tau_stop = guess.is_unsure
            num_read = len(guess.token_ids) - (not guess.is_unsure)  # of its own guesses
            self._computed(sequence, len(sequence.token_ids) + num_read)

    def _step_by_step(self, drafting: list[DecodeSequence], wanted: Wanted) -> None:
        """One forward per depth; tokens are drawn here."""
        rows = [self._first_rows(sequence) for sequence in drafting]
        while drafting:
            logits = self._model.forward(self._model.batch(rows))
            for sequence in drafting:
                self._computed(sequence, len(sequence.token_ids) + len(wanted[sequence][0].token_ids))
            sure = self._draw(logits, drafting, [wanted[s][0] for s in drafting])
            drafting = [s for s in sure if self._goes_on(s, *wanted[s])]
            rows = [self._last_guess(s, wanted[s][0]) for s in drafting]
        for sequence, (proposal, _) in wanted.items():
            sequence.sampling.rollback(len(proposal.token_ids))

    def num_unread(self, sequence: DecodeSequence) -> int:
        """None where the KV is the target's."""
        return 0

    def settle(self, sequence: DecodeSequence) -> None:
        """The step is over and `sequence` holds its new tokens."""

    def leave(self, sequence: DecodeSequence) -> None:
        """The sequence has ended."""

    def _ready(self, sequences: list[DecodeSequence]) -> list[DecodeSequence]:
        """Those that can draft in this step."""
        return sequences

    def _first_rows(self, sequence: DecodeSequence) -> SequenceRows:
        """What the draft has not computed yet, up to the newest token."""
        raise NotImplementedError

    def _computed(self, sequence: DecodeSequence, num_tokens: int) -> None:
        """The draft's KV of so many tokens, guesses included, is in the cache."""

    @staticmethod
    def _last_guess(sequence: DecodeSequence, proposal: Proposal) -> SequenceRows:
        start = len(sequence.token_ids) + len(proposal.token_ids) - 1
        return SequenceRows(proposal.token_ids[-1:], start, sequence.blocks)

    def _draw(
        self, logits: Any, sequences: list[DecodeSequence], proposals: list[Proposal]
    ) -> list[DecodeSequence]:
        """One guess per row; returns the sequences that go on.

        Where the draft gives no token the request's threshold, no guess is made: that is decided before the
        draw, so it changes no distribution.
        """
        states = [sequence.sampling for sequence in sequences]
        thresholds = [self._threshold(sequence) for sequence in sequences]
        are_plain = all(sequence.is_plainly_greedy for sequence in sequences)
        scores = logits if are_plain else process_logits(logits, states)
        token_ids = scores.argmax(-1)
        for stream in (Stream.TOKEN, Stream.DRAFT):
            rows = [i for i, s in enumerate(sequences) if s.draft_stream is stream]
            if rows:
                token_ids[rows] = draw(scores[rows], [states[i] for i in rows], stream)
        are_judged = any(s.draft_stream is Stream.DRAFT for s in sequences)
        needs_probs = any(thresholds) or self._least_product > 0 or are_judged
        probs = scores.double().softmax(-1) if needs_probs else None
        confidence = [1.0] * len(sequences) if probs is None else probs.amax(-1).tolist()
        going_on = []
        for i, (sequence, token_id) in enumerate(zip(sequences, token_ids.tolist(), strict=True)):
            if confidence[i] < thresholds[i]:
                proposals[i].is_tau_stop = True
                continue
            if probs is not None and sequence.draft_stream is Stream.DRAFT:
                proposals[i].probs.append(probs[i].float().cpu().numpy())
            proposals[i].token_ids.append(token_id)
            proposals[i].confidence *= confidence[i]
            sequence.sampling.append(token_id)
            going_on.append(sequence)
        return going_on

    def _goes_on(self, sequence: DecodeSequence, proposal: Proposal, count: int) -> bool:
        return len(proposal.token_ids) < count and proposal.confidence >= self._least(sequence)

    def _least(self, sequence: DecodeSequence) -> float:
        """The product of confidences that it goes on with."""
        return self._least_product if sequence.goes_by_confidence else 0.0

    def _threshold(self, sequence: DecodeSequence) -> float:
        asked = sequence.work.speculation.assistant_confidence_threshold
        return self._default_threshold if asked is None else asked


def _draws_of(sequences: Sequence[DecodeSequence]) -> list[Draw] | None:
    """For the first guess of each; None where all are the most probable."""
    if all(sequence.draft_stream is None for sequence in sequences):
        return None
    return [s.sampling.draw(0, s.draft_stream or Stream.TOKEN) for s in sequences]
