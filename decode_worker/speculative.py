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

from decode_worker.decoder import Advance, PlainDecoder, draws_of
from decode_worker.drafts.draft import Draft, Proposal
from decode_worker.earnings import Earnings
from decode_worker.lookahead import Lookahead, StepOutcome
from decode_worker.plain_run import PlainRun
from decode_worker.sequence import DecodeSequence
from decode_worker.step_costs import StepCosts
from decode_worker.verification import drafted_rows, verify, verify_chosen
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.speculation import MAX_ASSISTANT_TOKENS
from tandem.speculation_usage import SpeculationReport, SpeculationUsage

log = logging.getLogger(__name__)

MAX_FAILURES = 3


class SpeculativeDecoder:
    """A `Decoder` that may bring several tokens per sequence and step."""

    def __init__(
        self, model: ModelRunner, draft: Draft, lookahead: Lookahead, costs: StepCosts | None = None
    ) -> None:
        self._model = model
        self._plain = PlainDecoder(model.called("decode"))
        self._draft = draft
        self._lookahead = lookahead
        self._costs = costs
        self._failures_in_a_row = 0
        self._run: PlainRun | None = None
        self.earnings = Earnings(costs, MAX_ASSISTANT_TOKENS)

    @property
    def stats(self) -> SpeculationUsage:
        """Sums since the start."""
        return self.earnings.usage

    def step(self, sequences: Sequence[DecodeSequence]) -> list[Advance]:
        if self._run is not None and self._run.goes_on_with(sequences):
            return self._run.step()
        self._end_run()
        began_s, caught_up_s = time.perf_counter(), self._draft.catch_up_s
        counts = self._lookahead.counts(sequences)
        if self._failures_in_a_row >= MAX_FAILURES or not any(counts):
            self._run = PlainRun(self._plain, sequences, self._lookahead.patience, self.earnings)
            return self._run.step()
        proposals = self._propose(sequences, counts)
        drafted_s = time.perf_counter()
        advances = self._verify(sequences, proposals)
        verified_s = time.perf_counter()
        draft_s, catch_up_s = drafted_s - began_s, self._draft.catch_up_s - caught_up_s
        self._learn(StepOutcome(sequences, advances, draft_s - catch_up_s, verified_s - drafted_s), draft_s)
        return advances

    def settle(self, sequences: Sequence[DecodeSequence]) -> None:
        if self._run is not None:
            return  # nothing was guessed
        for sequence in sequences:
            self._draft.settle(sequence)

    def leave(self, sequence: DecodeSequence) -> None:
        self._end_run()
        self._draft.leave(sequence)
        self._lookahead.leave(sequence)

    def report(self) -> SpeculationReport:
        return self.earnings.report()

    def _end_run(self) -> None:
        """Learn from plain steps that nothing was learnt from yet."""
        run, self._run = self._run, None
        if run is not None and run.num_steps:
            self._learn(run.end(), 0.0)

    def _propose(self, sequences: Sequence[DecodeSequence], counts: Sequence[int]) -> list[Proposal]:
        """Guesses that are safe to verify; none if the draft fails."""
        positions = [sequence.sampling.position for sequence in sequences]
        try:
            proposals = self._draft.propose(sequences, counts, self._lookahead.worth)
            self._failures_in_a_row = 0
        except Exception:  # whatever a draft does, requests go on
            self.earnings.num_failures += 1
            self._failures_in_a_row += 1
            log.exception("the draft failed (%d in a row)", self._failures_in_a_row)
            proposals = [Proposal() for _ in sequences]
            for sequence, position in zip(sequences, positions, strict=True):
                sequence.sampling.rollback(sequence.sampling.position - position)
                self._draft.leave(sequence)  # it may be half-way; it starts afresh
        return [self._sane(p, n) for p, n in zip(proposals, counts, strict=True)]

    def _verify(self, sequences: Sequence[DecodeSequence], proposals: Sequence[Proposal]) -> list[Advance]:
        """One forward over all rows; it chooses the tokens too unless Python has to see the logits."""
        rows = [self._rows(*pair) for pair in zip(sequences, proposals, strict=True)]
        drafted = drafted_rows(sequences, proposals)
        if any(s.needs_logits for s in sequences) or (drafted and not self._model.can_guess):
            return verify(sequences, proposals, self._model.forward(self._model.batch(rows)))
        draws = draws_of(sequences, [len(each.token_ids) for each in rows])
        return verify_chosen(sequences, proposals, self._model.choose(rows, draws, drafted))

    def _sane(self, proposal: Proposal, count: int) -> Proposal:
        """Cut at the first token outside the vocabulary: nothing is ever indexed with it."""
        good = 0
        for token_id in proposal.token_ids[:count]:
            if not 0 <= token_id < self._model.vocab_size:
                break
            good += 1
        if good == len(proposal.token_ids):
            return proposal
        return Proposal(proposal.token_ids[:good], proposal.probs[:good], proposal.is_tau_stop)

    @staticmethod
    def _rows(sequence: DecodeSequence, proposal: Proposal) -> SequenceRows:
        """The token not yet computed, then the draft tokens; a row's logits judge the token after it."""
        token_ids = [sequence.next_token, *proposal.token_ids]
        return SequenceRows(token_ids, sequence.num_computed, sequence.blocks, num_logits=len(token_ids))

    def _learn(self, outcome: StepOutcome, draft_s: float) -> None:
        if self._costs is not None:
            self._costs.observe(outcome)
        self._lookahead.observe(outcome)
        self.earnings.observe(outcome, draft_s)
