"""Results one after the other, each made while the one before it is used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


async def one_ahead(makers: Iterable[Callable[[], Coroutine[Any, Any, T]]]) -> AsyncGenerator[T]:
    """What each maker makes, in order; at most one works at a time. Whoever stops early closes the iterator,
    which cancels the one at work and waits until it has left."""
    rest = iter(makers)
    making = _begun(rest)
    try:
        while making is not None:
            made = await making
            making = _begun(rest)
            yield made
    finally:
        if making is not None:
            await _left(making)


def _begun(makers: Iterator[Callable[[], Coroutine[Any, Any, T]]]) -> asyncio.Task[T] | None:
    make = next(makers, None)
    return None if make is None else asyncio.create_task(make())


async def _left(making: asyncio.Task[Any]) -> None:
    """Being cancelled meanwhile is raised when the task has left."""
    making.cancel()
    cancelled: asyncio.CancelledError | None = None
    while not making.done():
        try:
            await asyncio.wait({making})
        except asyncio.CancelledError as error:
            cancelled = error
    if not making.cancelled():
        making.exception()  # nobody wants to know
    if cancelled is not None:
        raise cancelled
