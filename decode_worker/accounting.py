"""What a step brought its sequences, token by token: text, stops, numbers; or why it brought nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from decode_worker.decoder import Advance
from decode_worker.sequence import DecodeSequence, Emit, Event
from tandem.engine.work_state import logprobs_of
from tandem.errors import Internal, TandemError, failure_of
from tandem.output import OutputDelta

log = logging.getLogger(__name__)


def account(sequence: DecodeSequence, advance: Advance) -> Event:
    """The news for the router. The first stop ends the sequence there."""
    if advance.is_bad:
        sequence.is_finished = True
        return Internal.numerics()
    news: OutputDelta | None = None
    for token in advance.tokens:
        sequence.advance(token.token_id)
        delta = sequence.output.append(token.token_id, logprobs_of(token))
        news = delta if news is None else news.followed_by(delta)
        if delta.finish is not None:
            sequence.is_finished = True
            break
    assert news is not None
    usage = sequence.usage() if sequence.is_finished else None
    return news._replace(
        drafted=advance.num_drafted,
        accepted=advance.num_accepted,
        speculation=usage if usage and usage.num_steps else None,
        cached=sequence.take_hit(),
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
