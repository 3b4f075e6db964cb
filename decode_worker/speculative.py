"""Speculative decoding: a draft guesses, the target checks all guesses of all sequences in one forward.

    draft       a cheap guesser (decode_worker/drafts); its tokens are *draft* tokens
    verify      one packed ragged forward of the target: 1 + k rows for a sequence with k draft tokens
    accept      keep the longest run of draft tokens that the target's rule allows (acceptance.py)
    roll back   the KV of rejected tokens is simply overwritten by the next step

The target's logits of a row do not depend on what else is in the forward, so under the `exact` policy
(and always for greedy requests) tokens equal those of plain decoding, whatever the draft does. The
`auto` policy samples with more accepted tokens: same distribution, other draws.

A draft that fails costs its guesses, never a token: the step goes on plainly, the failure is counted,
and after `MAX_FAILURES` in a row drafting is switched off for good.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decode_worker import acceptance
from decode_worker.decoder import Advance
from decode_worker.drafts.draft import Draft, Proposal
from decode_worker.lookahead import Lookahead, StepOutcome
from decode_worker.sequence import DecodeSequence
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.engine.rng import Stream, uniforms
from tandem.engine.sampler import BadLogits, Sampler, process_logits, sampled_token

log = logging.getLogger(__name__)

MAX_FAILURES = 3


@dataclass(slots=True)
class SpeculationStats:
    """Counts of one decode worker. Acceptance is counted before stops cut the output."""

    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_rollbacks: int = 0  # steps of a sequence in which a draft token was rejected
    num_failures: int = 0  # drafts that raised
    draft_s: float = 0.0
    verify_s: float = 0.0


class SpeculativeDecoder:
    """A `Decoder` that may bring several tokens per sequence and step."""

    def __init__(self, model: ModelRunner, draft: Draft, lookahead: Lookahead) -> None:
        self._model = model
        self._draft = draft
        self._lookahead = lookahead
        self._sampler = Sampler()
        self._failures_in_a_row = 0
        self.stats = SpeculationStats()

    def step(self, sequences: Sequence[DecodeSequence]) -> list[Advance]:
        began_s = time.perf_counter()
        proposals = self._propose(sequences)
        drafted_s = time.perf_counter()
        rows = [self._rows(*pair) for pair in zip(sequences, proposals, strict=True)]
        logits = self._model.forward(self._model.batch(rows))
        verified_s = time.perf_counter()
        advances = self._verify(sequences, proposals, logits)
        self._count(advances, drafted_s - began_s, verified_s - drafted_s)
        return advances

    def settle(self, sequences: Sequence[DecodeSequence]) -> None:
        for sequence in sequences:
            self._draft.settle(sequence)

    def leave(self, sequence: DecodeSequence) -> None:
        self._draft.leave(sequence)

    def _propose(self, sequences: Sequence[DecodeSequence]) -> list[Proposal]:
        """Guesses that are safe to verify; none if the draft fails."""
        counts = self._lookahead.counts(sequences)
        if self._failures_in_a_row >= MAX_FAILURES or not any(counts):
            return [Proposal() for _ in sequences]
        positions = [sequence.sampling.position for sequence in sequences]
        try:
            proposals = self._draft.propose(sequences, counts)
            self._failures_in_a_row = 0
        except Exception:  # whatever a draft does, requests go on
            self.stats.num_failures += 1
            self._failures_in_a_row += 1
            log.exception("the draft failed (%d in a row)", self._failures_in_a_row)
            proposals = [Proposal() for _ in sequences]
            for sequence, position in zip(sequences, positions, strict=True):
                sequence.sampling.rollback(sequence.sampling.position - position)
                self._draft.leave(sequence)  # it may be half-way; it starts afresh
        return [self._sane(p, n) for p, n in zip(proposals, counts, strict=True)]

    def _sane(self, proposal: Proposal, count: int) -> Proposal:
        """Cut at the first token outside the vocabulary: nothing is ever indexed with it."""
        good = 0
        for token_id in proposal.token_ids[:count]:
            if not 0 <= token_id < self._model.vocab_size:
                break
            good += 1
        return Proposal(proposal.token_ids[:good], proposal.probs[:good])

    @staticmethod
    def _rows(sequence: DecodeSequence, proposal: Proposal) -> SequenceRows:
        """The token not yet computed, then the draft tokens; a row's logits judge the token after it."""
        token_ids = [sequence.next_token, *proposal.token_ids]
        return SequenceRows(token_ids, sequence.num_computed, sequence.blocks, num_logits=len(token_ids))

    def _verify(
        self, sequences: Sequence[DecodeSequence], proposals: Sequence[Proposal], logits: Any
    ) -> list[Advance]:
        """Position by position over all sequences that still agree with their draft."""
        counts = [len(proposal.token_ids) for proposal in proposals]
        first_row = np.cumsum([0, *(count + 1 for count in counts)])[:-1]
        advances = [Advance(num_drafted=count) for count in counts]
        alive = list(range(len(sequences)))
        for offset in range(max(counts) + 1):
            rows = [int(first_row[i]) + offset for i in alive]
            matched = [i for i in alive if sequences[i].draft_stream is not Stream.DRAFT or not counts[i]]
            tokens = self._sampler.sample(
                logits[[row for row, i in zip(rows, alive, strict=True) if i in matched]],
                [sequences[i].sampling for i in matched],
            )
            results = dict(zip(matched, tokens, strict=True))
            following = []
            for row, i in zip(rows, alive, strict=True):
                token = (
                    results[i]
                    if i in results
                    else self._judge(sequences[i], proposals[i], offset, logits[row])
                )
                if self._take(sequences[i], proposals[i], offset, token, advances[i]):
                    following.append(i)
            alive = following
            if not alive:
                break
        return advances

    @staticmethod
    def _take(
        sequence: DecodeSequence, proposal: Proposal, offset: int, token: Any, advance: Advance
    ) -> bool:
        """Add one token; True if it is the draft's, so that the next row counts too."""
        if isinstance(token, BadLogits):
            advance.is_bad = not advance.tokens  # good tokens before it stand; the row comes again next step
            return False
        sequence.sampling.append(token.token_id)
        advance.tokens.append(token)
        if offset < len(proposal.token_ids) and token.token_id == proposal.token_ids[offset]:
            advance.num_accepted += 1
            return True
        return False

    @staticmethod
    def _judge(sequence: DecodeSequence, proposal: Proposal, offset: int, row: Any) -> Any:
        """Speculative sampling of one position: the draft token, or a recovered or bonus token."""
        state = sequence.sampling
        scores = process_logits(row[None], [state])
        target_probs = scores[0].double().softmax(-1).cpu().numpy()
        if not np.isfinite(target_probs).all():
            return BadLogits()

        def chance(stream: Stream) -> float:
            return float(uniforms([state.seed], [state.position], stream)[0])

        if offset == len(proposal.token_ids):
            return sampled_token(acceptance.draw(target_probs, chance(Stream.TOKEN)), row, state)
        draft_id = proposal.token_ids[offset]
        draft_probs = proposal.probs[offset] if proposal.probs else acceptance.point(draft_id, target_probs)
        if acceptance.is_accepted(draft_id, draft_probs, target_probs, chance(Stream.ACCEPT)):
            return sampled_token(draft_id, row, state)
        rest = acceptance.residual(draft_probs, target_probs)
        return sampled_token(acceptance.draw(rest, chance(Stream.RESIDUAL)), row, state)

    def _count(self, advances: Sequence[Advance], draft_s: float, verify_s: float) -> None:
        num_drafted = sum(advance.num_drafted for advance in advances)
        num_accepted = sum(advance.num_accepted for advance in advances)
        num_rejected = sum(advance.num_accepted < advance.num_drafted for advance in advances)
        self.stats.num_steps += len(advances)
        self.stats.num_drafted += num_drafted
        self.stats.num_accepted += num_accepted
        self.stats.num_rollbacks += num_rejected
        self.stats.draft_s += draft_s
        self.stats.verify_s += verify_s
        self._lookahead.observe(
            StepOutcome(
                num_sequences=len(advances),
                depth=max(advance.num_drafted for advance in advances),
                num_rows=num_drafted + len(advances),
                num_judged=num_accepted + num_rejected,
                num_accepted=num_accepted,
                draft_s=draft_s,
                verify_s=verify_s,
            )
        )
