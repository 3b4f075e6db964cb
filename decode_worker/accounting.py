"""What a step brought its sequences, token by token: text, stops, numbers; or why it brought nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from decode_worker.decoder import Advance
from decode_worker.sequence import DecodeSequence, Emit, Event
from tandem.engine.work_state import logprobs_of
from tandem.errors import Internal, TandemError, failure_of
from tandem.output import OutputDelta, TokenLogprobs

log = logging.getLogger(__name__)


def account(sequence: DecodeSequence, advance: Advance) -> Event:
    """The news for the router. The first stop ends the sequence there."""
    if advance.is_bad:
        sequence.is_finished = True
        return Internal.numerics()
    token_ids: list[int] = []
    entries: list[TokenLogprobs] = []
    text, finish, matched = "", None, None
    for token in advance.tokens:
        token_ids.append(token.token_id)
        sequence.advance(token.token_id)
        more, finish, matched = sequence.output.take(token.token_id)
        text += more
        if (entry := logprobs_of(token)) is not None:
            entries.append(entry)
        if finish is not None:
            sequence.is_finished = True
            break
    usage = sequence.usage() if sequence.is_finished else None
    return OutputDelta(
        tuple(token_ids),
        text,
        tuple(entries),
        finish,
        matched,
        advance.num_drafted,
        advance.num_accepted,
        usage if usage and usage.num_steps else None,
        sequence.take_hit(),
    )


def failure_in(batch: Sequence[DecodeSequence], error: Exception) -> TandemError:
    """What the clients of a step that raised are told; the rest is logged."""
    failure = failure_of(error)
    log.error("decode of %d sequences failed (%s)", len(batch), failure.error_id, exc_info=error)
    return failure


def by_router(
    events: Sequence[tuple[DecodeSequence, Event]],
) -> dict[Emit, list[tuple[DecodeSequence, Event]]]:
    """The events of each router, in order."""
    found: dict[Emit, list[tuple[DecodeSequence, Event]]] = {}
    for sequence, event in events:
        found.setdefault(sequence.emit, []).append((sequence, event))
    return found
