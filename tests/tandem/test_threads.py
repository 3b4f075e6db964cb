"""A function in a thread is always waited for, however often its caller is cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tandem.threads import to_thread_to_end
from tests.serving import until


async def test_it_returns_what_the_function_returns_from_another_thread():
    assert await to_thread_to_end(lambda a, *, b: (a, b), 1, b=2) == (1, 2)
    assert await to_thread_to_end(threading.get_ident) != threading.get_ident()


async def test_it_raises_what_the_function_raises():
    with pytest.raises(ZeroDivisionError):
        await to_thread_to_end(lambda: 1 / 0)


class Slow:
    def __init__(self) -> None:
        self.entered, self.may_end, self.is_over = False, threading.Event(), False

    def __call__(self, fail=False):
        self.entered = True
        assert self.may_end.wait(5)
        self.is_over = True
        if fail:
            raise ValueError("nobody listens")


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("num_cancels", [1, 2, 5])
async def test_a_cancellation_comes_only_when_the_function_has_returned(num_cancels, fail):
    slow = Slow()
    task = asyncio.ensure_future(to_thread_to_end(slow, fail))
    await until(lambda: slow.entered)
    for _ in range(num_cancels):
        task.cancel()
        await asyncio.sleep(0.005)
    assert not task.done()
    slow.may_end.set()
    await asyncio.wait({task})
    assert task.cancelled()
    assert slow.is_over


async def test_a_deadline_waits_for_the_function_too():
    slow = Slow()
    asyncio.get_running_loop().call_later(0.05, slow.may_end.set)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await to_thread_to_end(slow)
    assert slow.is_over


def test_the_end_of_the_loop_waits_for_the_function():
    """asyncio.run cancels every task of the loop; the function's must not be one of them."""
    slow, seen = Slow(), []

    async def work() -> None:
        try:
            await to_thread_to_end(slow)
        finally:
            seen.append(slow.is_over)

    async def main() -> None:
        task = asyncio.ensure_future(work())
        await until(lambda: slow.entered)
        threading.Timer(0.05, slow.may_end.set).start()
        del task

    asyncio.run(main())
    assert seen == [True]
