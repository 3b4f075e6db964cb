"""Steps faster than messages are worth: the same tokens in fewer messages, and nothing late that presses."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker import handover
from decode_worker.handover import LONGEST_S, SHARE, SHORTEST_S, Handover, pace_s
from decode_worker.sequence import DecodeSequence, Event
from tandem.engine.work_state import sampling_state
from tandem.errors import Unavailable
from tandem.output import OutputDelta
from tandem.request import FinishReason
from tests.decode_worker.rig import make_order
from tests.serving import make_model, tokenizer, until

NEVER_S, PATIENCE_S = 60.0, 5


class Told:
    """A router's side: what came, by message, and the wish to see more."""

    def __init__(self) -> None:
        self.messages: list[list[tuple[DecodeSequence, Event]]] = []
        self._more = asyncio.Event()

    def emit(self, news: list[tuple[DecodeSequence, Event]]) -> None:
        self.messages.append(news)
        self._more.set()

    async def until(self, num_messages: int) -> list[tuple[DecodeSequence, Event]]:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.messages) < num_messages:
                self._more.clear()
                await self._more.wait()
        return self.messages[-1]

    def tokens(self, sequence: DecodeSequence) -> list[int]:
        told = (event for message in self.messages for one, event in message if one is sequence)
        return [token_id for event in told if isinstance(event, OutputDelta) for token_id in event.token_ids]


def make_sequence(told: Told) -> DecodeSequence:
    work, model = make_order(), make_model(4)
    output, sampling = work.output_stream(tokenizer(), ()), sampling_state(work, model)
    return DecodeSequence(work, None, told.emit, output, sampling)


def token(number: int, *, is_last: bool = False) -> OutputDelta:
    return OutputDelta((number,), f"{number} ", finish=FinishReason.LENGTH if is_last else None)


@given(st.integers(1, 512), st.integers(1, 128))
def test_messages_cost_no_more_than_their_share_as_long_as_nobody_waits_too_long(num_sequences, num_cores):
    pace = pace_s(num_sequences, num_cores)
    assert SHORTEST_S <= pace <= LONGEST_S
    assert pace_s(num_sequences + 1, num_cores) >= pace >= pace_s(num_sequences, num_cores + 1)
    if pace < LONGEST_S:
        assert handover.MESSAGE_S + handover.SEQUENCE_S * num_sequences <= 1.001 * SHARE * num_cores * pace


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=12))
def test_every_router_is_told_everything_in_order(steps):
    """Which of three sequences a step brings tokens; the first two are of one router."""

    async def run() -> None:
        routers = [Told(), Told()]
        owners = [routers[0], routers[0], routers[1]]
        sequences = [make_sequence(router) for router in owners]
        hand = Handover()

        def step_thread() -> None:
            for number, chosen in enumerate(steps):
                hand.put([(s, token(number)) for s, is_in in zip(sequences, chosen, strict=True) if is_in])
            hand.put([(s, token(len(steps), is_last=True)) for s in sequences])

        await asyncio.to_thread(step_thread)
        told = list(zip(owners, sequences, strict=True))
        await until(lambda: all(len(steps) in router.tokens(sequence) for router, sequence in told))
        for index, (router, sequence) in enumerate(told):
            expected = [number for number, chosen in enumerate(steps) if chosen[index]]
            assert router.tokens(sequence) == [*expected, len(steps)]

    asyncio.run(run())


async def test_further_tokens_wait_for_those_of_the_next_moment(monkeypatch):
    monkeypatch.setattr(handover, "pace_s", lambda num_sequences, num_cores: 0.5 * num_sequences)
    told, hand, loop = Told(), Handover(), asyncio.get_running_loop()
    sequence = make_sequence(told)
    hand.put([(sequence, token(1))])
    await told.until(1)
    began_s = loop.time()
    hand.put([(sequence, token(2))])
    hand.put([(sequence, token(3))])
    [(_, merged)] = await told.until(2)
    assert merged == token(2).followed_by(token(3))
    assert loop.time() - began_s >= 0.25


async def test_after_a_pause_nobody_waits(monkeypatch):
    monkeypatch.setattr(handover, "pace_s", lambda *_: 0.001)
    told, hand = Told(), Handover()
    sequence = make_sequence(told)
    hand.put([(sequence, token(1))])
    await told.until(1)
    await asyncio.sleep(0.02)
    monkeypatch.setattr(handover, "pace_s", lambda *_: NEVER_S)
    hand.put([(sequence, token(2))])
    [(_, delta)] = await told.until(2)
    assert delta == token(2)


@pytest.mark.parametrize("pressing", [token(9), token(9, is_last=True), Unavailable.draining()])
async def test_a_beginning_an_end_and_a_failure_take_along_what_waits(monkeypatch, pressing):
    monkeypatch.setattr(handover, "pace_s", lambda *_: NEVER_S)
    told, hand = Told(), Handover()
    patient, other = make_sequence(told), make_sequence(told)
    speaks = not (isinstance(pressing, OutputDelta) and pressing.finish is None)
    hand.put([(patient, token(1)), *([(other, token(1))] if speaks else [])])
    await told.until(1)
    hand.put([(patient, token(2))])
    await asyncio.sleep(0.01)
    assert len(told.messages) == 1
    hand.put([(other, pressing)])
    assert [event for _, event in await told.until(2)] == [token(2), pressing]


async def test_the_loop_wakes_up_once_for_a_message(monkeypatch):
    """However many steps it is of."""
    monkeypatch.setattr(handover, "pace_s", lambda *_: 0.5)
    told, hand, loop = Told(), Handover(), asyncio.get_running_loop()
    wakes, wake = Counter[str](), loop.call_soon_threadsafe

    def counted(*args):
        wakes["all"] += 1
        return wake(*args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    sequence = make_sequence(told)
    for number in range(30):
        hand.put([(sequence, token(number))])
        await asyncio.sleep(0.01)
    await until(lambda: told.tokens(sequence) == list(range(30)))
    assert len(told.messages) <= 4
    assert wakes["all"] <= 2, "the first token's; timers see to the others"
