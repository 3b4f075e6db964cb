"""A stream that is slower than the steps: fewer messages, the same tokens."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from decode_worker.outbox import Outbox
from decode_worker.sequence import Started
from tandem.errors import Unavailable
from tandem.output import OutputDelta
from tandem.request import FinishReason

KEYS = [("a", 1), ("a", 2), ("b", 1)]


def token(number: int) -> OutputDelta:
    return OutputDelta((number,), f"{number} ", drafted=2, accepted=1)


def flat(events) -> dict:
    """What each sequence is told: its start, then tokens and their text behind each other."""
    told: dict = {key: [] for key in KEYS}
    for key, event in events:
        pieces = (
            zip(event.token_ids, event.text.split(), strict=True)
            if isinstance(event, OutputDelta)
            else [event]
        )
        told[key] += pieces
    return told


@given(st.lists(st.one_of(st.integers(0, 2), st.none()), max_size=40))
def test_whatever_is_taken_when_every_sequence_is_told_the_same(choices) -> None:
    """A number: a token for that sequence; None: the stream takes what there is."""

    async def run() -> None:
        put = [(key, Started(0, 0)) for key in KEYS]
        box, messages, waiting = Outbox(), [], True
        box.put(put)
        for choice in [*choices, None]:
            if choice is not None:
                put.append((KEYS[choice], token(len(put))))
                box.put(put[-1:])
                waiting = True
            elif waiting:
                messages.append(await box.take())
                waiting = False
        got = [event for message in messages for event in message]
        assert flat(got) == flat(put)
        for message in messages:
            kinds = [(key, type(event)) for key, event in message]
            assert len(kinds) == len(set(kinds)), "tokens that waited are one event"

    asyncio.run(run())


async def test_counts_and_ends_survive_the_merge() -> None:
    box = Outbox()
    box.put([(KEYS[0], token(1))])
    box.put([(KEYS[0], token(2)._replace(finish=FinishReason.LENGTH)), (KEYS[2], Unavailable.draining())])
    (_, merged), (key, failed) = await box.take()
    assert merged.token_ids == (1, 2)
    assert (merged.drafted, merged.accepted, merged.finish) == (4, 2, FinishReason.LENGTH)
    assert key == KEYS[2]
    assert isinstance(failed, Unavailable)


async def test_nothing_is_taken_after_the_end() -> None:
    box = Outbox()
    box.put([(KEYS[0], token(1))])
    box.close()
    assert await box.take() is None
