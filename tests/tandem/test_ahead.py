"""One result is made while the last is used, and nothing is left at work."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from functools import partial

import pytest

from tandem.ahead import one_ahead
from tandem.threads import to_thread_to_end


class Makers:
    """`make(i)` notes when it begins and ends."""

    def __init__(self, seconds=0.0, error_at=None):
        self.log = []
        self._seconds = seconds
        self._error_at = error_at

    async def make(self, number):
        self.log.append(f"begin {number}")
        try:
            await asyncio.sleep(self._seconds)
            if number == self._error_at:
                raise ValueError(number)
            return number
        finally:
            self.log.append(f"end {number}")

    def all(self, count):
        return [partial(self.make, number) for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
async def test_all_come_in_order(count):
    assert [made async for made in one_ahead(Makers().all(count))] == list(range(count))


async def test_the_next_is_made_while_one_is_used_and_never_two():
    makers = Makers()
    async for made in one_ahead(makers.all(3)):
        await asyncio.sleep(0.01)
        assert makers.log[-1] == f"end {min(2, made + 1)}"
        assert len(makers.log) == 2 * min(3, made + 2)


async def test_an_error_comes_when_it_is_its_turn():
    makers = Makers(error_at=2)
    results = one_ahead(makers.all(5))
    assert [await anext(results), await anext(results)] == [0, 1]
    with pytest.raises(ValueError, match="2"):
        await anext(results)
    assert makers.log[-1] == "end 2"


@pytest.mark.parametrize("error_at", [None, 1])
async def test_whoever_stops_early_leaves_nothing_at_work(error_at):
    makers = Makers(0.001, error_at)
    async with aclosing(one_ahead(makers.all(5))) as results:
        assert await anext(results) == 0
        await asyncio.sleep(0 if error_at is None else 0.05)
    assert makers.log == ["begin 0", "end 0", "begin 1", "end 1"]


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_user_leaves_when_the_thread_at_work_has_returned(times):
    ends = []

    def work(number):
        time.sleep(0.1)
        ends.append(number)
        return number

    async def use():
        makers = [partial(to_thread_to_end, work, number) for number in range(9)]
        async with aclosing(one_ahead(makers)) as results:
            async for _ in results:
                await asyncio.sleep(0.01)

    using = asyncio.create_task(use())
    await asyncio.sleep(0.15)  # the second is at work
    for _ in range(times):
        using.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await using
    assert ends == [0, 1]
    assert len(asyncio.all_tasks()) == 1
