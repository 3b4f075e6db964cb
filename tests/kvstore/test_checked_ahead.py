"""Messages are checked in order, in a thread beside the use of those before them."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.ahead import AHEAD_BYTES, HERE_BYTES, checked_ahead
from tandem.errors import DataLoss
from tests.kvstore.test_service import until

MESSAGES = [bytes([number]) * HERE_BYTES for number in range(12)]


async def collect(messages, check):
    return [each async for each in checked_ahead(iter(messages), check)]


@given(sizes=st.lists(st.sampled_from([1, 1000, HERE_BYTES - 1, HERE_BYTES, AHEAD_BYTES, AHEAD_BYTES + 1])))
def test_every_message_is_checked_once_and_in_order(sizes):
    zeros, checked = memoryview(bytes(max(sizes, default=0))), []

    def check(message):
        checked.append(len(message))
        return len(message)

    assert asyncio.run(collect([zeros[:size] for size in sizes], check)) == sizes == checked


async def test_small_objects_need_no_thread():
    def check(message):
        assert threading.current_thread() is threading.main_thread()

    await collect([b"header", bytes(HERE_BYTES), b"seal"], check)


async def test_the_next_are_checked_while_the_first_is_used():
    checked = []
    async with aclosing(checked_ahead(iter(MESSAGES), lambda message: checked.append(message[0]))) as found:
        await anext(found)
        assert checked == [0]
        await until(lambda: checked == [0, 1, 2, 3, 4])
        await asyncio.sleep(0.05)
    assert checked == [0, 1, 2, 3, 4], "no more than a turn ahead, and no more for who has left"


@pytest.mark.parametrize("bad", [0, 1, 4, 5, 11])
async def test_what_is_corrupt_is_never_given_out(bad):
    def check(message):
        if message[0] == bad:
            raise DataLoss
        return message[0]

    found = []

    async def use():
        async for each in checked_ahead(iter(MESSAGES), check):
            found.append(each)  # noqa: PERF401 (kept when the next one raises)

    with pytest.raises(DataLoss):
        await use()
    assert found == list(range(len(found)))
    assert bad not in found


async def test_who_leaves_hears_nothing_of_what_was_checked_for_them():
    def check(message):
        if message[0]:
            raise DataLoss

    async with aclosing(checked_ahead(iter(MESSAGES), check)) as found:
        await anext(found)
        await asyncio.sleep(0.02)
