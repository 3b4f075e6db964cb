"""From the target's logits to tokens: which draft tokens of each sequence stand, and the one after them.

Row `first_row[i] + j` of the logits judges draft token j of sequence i; the row after the last draft token
gives the bonus token. Sampling states are advanced over every token taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from decode_worker import acceptance
from decode_worker.decoder import Advance
from decode_worker.drafts.draft import Proposal
from decode_worker.sequence import DecodeSequence
from tandem.engine.rng import Stream, uniforms
from tandem.engine.sampler import BadLogits, SampledToken, Sampler, process_logits, sampled_token

Pair = tuple[DecodeSequence, Proposal]


def verify(sequences: Sequence[DecodeSequence], proposals: Sequence[Proposal], logits: Any) -> list[Advance]:
    """`logits` [rows, vocab] holds 1 + k rows for a sequence with k draft tokens."""
    first_rows = np.cumsum([0, *(1 + len(proposal.token_ids) for proposal in proposals)]).tolist()
    advances = [
        Advance(num_drafted=len(proposal.token_ids), is_tau_stop=proposal.is_tau_stop)
        for proposal in proposals
    ]
    plain = [i for i, sequence in enumerate(sequences) if sequence.is_plainly_greedy]
    if plain:
        token_ids, sums = logits.argmax(-1).tolist(), logits.sum(-1).tolist()
        for i in plain:
            rows = range(first_rows[i], first_rows[i + 1])
            _walk(sequences[i], proposals[i], advances[i], _greedy(token_ids, sums, rows))
    others = [i for i, sequence in enumerate(sequences) if not sequence.is_plainly_greedy]
    if others:
        _side_by_side(sequences, proposals, advances, logits, first_rows, others)
    return advances


def _greedy(token_ids: list[int], sums: list[float], rows: range) -> Iterator[SampledToken | BadLogits]:
    for row in rows:
        is_finite = sums[row] - sums[row] == 0
        yield SampledToken(token_ids[row]) if is_finite else BadLogits()


def _walk(
    sequence: DecodeSequence,
    proposal: Proposal,
    advance: Advance,
    tokens: Iterator[SampledToken | BadLogits],
) -> None:
    for offset, token in enumerate(tokens):
        if not _take(sequence, proposal, offset, token, advance):
            break


def _side_by_side(
    sequences: Sequence[DecodeSequence],
    proposals: Sequence[Proposal],
    advances: Sequence[Advance],
    logits: Any,
    first_rows: list[int],
    alive: list[int],
) -> None:
    """Place by place over all sequences that still agree with their draft."""
    sampler, offset = Sampler(), 0
    while alive:
        judged = [i for i in alive if sequences[i].draft_stream is Stream.DRAFT and proposals[i].token_ids]
        matched = [i for i in alive if i not in judged]
        rows = [first_rows[i] + offset for i in matched]
        tokens = sampler.sample(logits[rows], [sequences[i].sampling for i in matched]) if matched else []
        results: dict[int, SampledToken | BadLogits] = dict(zip(matched, tokens, strict=True))
        for i in judged:
            results[i] = _judge(sequences[i], proposals[i], offset, logits[first_rows[i] + offset])
        alive = [i for i in alive if _take(sequences[i], proposals[i], offset, results[i], advances[i])]
        offset += 1


def _take(
    sequence: DecodeSequence,
    proposal: Proposal,
    offset: int,
    token: SampledToken | BadLogits,
    advance: Advance,
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


def _judge(sequence: DecodeSequence, proposal: Proposal, offset: int, row: Any) -> SampledToken | BadLogits:
    """Speculative sampling of one place: the draft token, or a recovered or bonus token."""
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
