"""From the target's logits to tokens: which draft tokens of each sequence stand, and the one after them.

Row `first_row[i] + j` of the logits judges draft token j of sequence i; the row after the last draft token
gives the bonus token. Sampling states are advanced over every token taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import Any

import numpy as np

from decode_worker import acceptance
from decode_worker.decoder import Advance
from decode_worker.drafts.draft import Proposal
from decode_worker.sequence import DecodeSequence
from tandem.engine.draw import NOT_DRAFTED, Drafted
from tandem.engine.rng import Stream, exponentials, uniforms
from tandem.engine.sampler import (
    NO_TOKEN,
    BadLogits,
    SampledToken,
    Sampler,
    most_probable,
    process_logits,
    sampled_token,
)
from tandem.engine.sampling_state import SamplingState
from tandem.profiling.spans import traced

Pair = tuple[DecodeSequence, Proposal]


@traced("accept")
def verify(sequences: Sequence[DecodeSequence], proposals: Sequence[Proposal], logits: Any) -> list[Advance]:
    """`logits` [rows, vocab] holds 1 + k rows for a sequence with k draft tokens."""
    first_rows = list(accumulate((1 + len(p.token_ids) for p in proposals), initial=0))
    advances = [_begun(proposal) for proposal in proposals]
    others = [i for i, sequence in enumerate(sequences) if not sequence.is_plainly_greedy]
    if len(others) < len(sequences):
        token_ids = most_probable(logits)
        for i, sequence in enumerate(sequences):
            if sequence.is_plainly_greedy:
                _walk(sequence, proposals[i], advances[i], token_ids, first_rows[i])
    if others:
        _side_by_side(sequences, proposals, advances, logits, first_rows, others)
    return advances


@traced("accept")
def verify_chosen(
    sequences: Sequence[DecodeSequence], proposals: Sequence[Proposal], token_ids: Sequence[int]
) -> list[Advance]:
    """As `verify`, of the tokens that a forward chose for its rows, `token_ids` [rows]."""
    advances, row = [], 0
    for sequence, proposal in zip(sequences, proposals, strict=True):
        advances.append(_begun(proposal))
        _walk(sequence, proposal, advances[-1], token_ids, row)
        row += 1 + len(proposal.token_ids)
    return advances


def drafted_rows(sequences: Sequence[DecodeSequence], proposals: Sequence[Proposal]) -> list[Drafted] | None:
    """What speculative sampling judges in each row of a verifying forward; None where it judges nothing."""
    if not any(sequence.draft_stream is Stream.DRAFT for sequence in sequences):
        return None
    rows: list[Drafted] = []
    for sequence, proposal in zip(sequences, proposals, strict=True):
        if sequence.draft_stream is Stream.DRAFT:
            probs = proposal.probs or repeat(None)
            rows += map(Drafted, proposal.token_ids, probs)
        else:
            rows += [NOT_DRAFTED] * len(proposal.token_ids)
        rows.append(NOT_DRAFTED)
    return rows


def _begun(proposal: Proposal) -> Advance:
    return Advance(num_drafted=len(proposal.token_ids), is_tau_stop=proposal.is_tau_stop)


def _walk(
    sequence: DecodeSequence, proposal: Proposal, advance: Advance, token_ids: Sequence[int], row: int
) -> None:
    """Rows from `row` on judge the draft tokens and give the one after them."""
    drafted = proposal.token_ids
    num_accepted = acceptance.match(drafted, token_ids[row : row + len(drafted)])
    taken = token_ids[row : row + num_accepted + 1]
    if taken[-1] == NO_TOKEN:
        taken = taken[:-1]
        advance.is_bad = not taken  # good tokens before it stand; the row comes again next step
    advance.num_accepted = num_accepted
    advance.tokens = list(map(SampledToken, taken))
    sequence.sampling.extend(taken)


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
        if judged:
            rows = [first_rows[i] + offset for i in judged]
            pairs = [(sequences[i], proposals[i]) for i in judged]
            results |= zip(judged, _judge(pairs, offset, logits[rows]), strict=True)
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
        advance.is_bad = not advance.tokens  # as in `_walk`
        return False
    sequence.sampling.append(token.token_id)
    advance.tokens.append(token)
    if offset < len(proposal.token_ids) and token.token_id == proposal.token_ids[offset]:
        advance.num_accepted += 1
        return True
    return False


def _judge(pairs: Sequence[Pair], offset: int, logits: Any) -> list[SampledToken | BadLogits]:
    """Speculative sampling of one place, `logits` [pairs, vocab]: draft tokens, recovered or bonus tokens."""
    states = [sequence.sampling for sequence, _ in pairs]
    probs = process_logits(logits, states).double().softmax(-1).cpu().numpy()
    is_finite = np.isfinite(probs).all(-1)
    results: list[SampledToken | BadLogits] = []
    for i, (state, (_, proposal)) in enumerate(zip(states, pairs, strict=True)):
        token_id = _choose(proposal, offset, probs[i], state) if is_finite[i] else None
        results.append(BadLogits() if token_id is None else sampled_token(token_id, logits[i], state))
    return results


def _choose(proposal: Proposal, offset: int, target_probs: acceptance.Probs, state: SamplingState) -> int:
    """The token of one place, by the numbers that belong to it."""
    key = [state.seed], [state.position]
    if offset == len(proposal.token_ids):
        return acceptance.draw(target_probs, exponentials(*key, Stream.TOKEN, len(target_probs))[0])
    draft_id = proposal.token_ids[offset]
    draft_probs = proposal.probs[offset] if proposal.probs else acceptance.point(draft_id, target_probs)
    if acceptance.is_accepted(draft_id, draft_probs, target_probs, uniforms(*key, Stream.ACCEPT).item()):
        return draft_id
    rest = acceptance.residual(draft_probs, target_probs)
    return acceptance.draw(rest, exponentials(*key, Stream.RESIDUAL, len(rest))[0])
