"""Operations run one after another, and one that nobody waits for any more is undone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvstore.turns import Turns
from tests.kvstore.test_service import until


@pytest.mark.parametrize("in_thread", [False, True])
async def test_in_the_order_in_which_they_were_asked_for(in_thread):
    turns, seen = Turns(in_thread=in_thread), []
    turns.post(seen.append, 1)
    assert await turns.take(lambda number: seen.append(number) or len(seen), 2) == 2
    turns.post(seen.append, 3)
    turns.close()
    assert seen == [1, 2, 3]
    if in_thread:
        turns.post(seen.append, 4)
        assert seen == [1, 2, 3]


async def test_what_a_cancelled_caller_asked_for_is_undone():
    turns, go_on, undone = Turns(in_thread=True), threading.Event(), []
    running = asyncio.create_task(turns.take_or_undo(lambda: go_on.wait() and "ticket", undone.append))
    waiting = asyncio.create_task(turns.take_or_undo(lambda: "never run", undone.append))
    await asyncio.sleep(0.01)
    running.cancel()
    waiting.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    go_on.set()
    await until(lambda: undone)
    turns.close()
    assert undone == ["ticket"]


async def test_what_fails_is_not_undone():
    turns, undone = Turns(in_thread=True), []
    with pytest.raises(ZeroDivisionError):
        await turns.take_or_undo(lambda: 1 // 0, undone.append)
    turns.close()
    assert undone == []
