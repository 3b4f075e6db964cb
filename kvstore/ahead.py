"""Checks the messages of a mapped object in a thread while those before them are used.

All of them are there already, and hashing lets go of the interpreter: of the two passes that a reader makes
over the bytes, one to check and one to use them, the first goes beside the second.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TypeVar

from kvstore.key import Buffer
from kvstore.link import drop
from tandem.threads import to_thread_to_end

T = TypeVar("T")
HERE_BYTES = 1 << 20  # are checked sooner than a thread is woken
AHEAD_BYTES = 4 << 20  # of small messages share a thread's turn, and are in the cache still when used


async def checked_ahead(messages: Iterator[Buffer], check: Callable[[Buffer], T]) -> AsyncGenerator[T]:
    """What `check` returns for each message, in order; the first messages are checked by the caller's thread.
    What it raises comes once all messages of the turns before were used."""
    checked = _checked(_turn(messages, HERE_BYTES), check)
    while turn := _turn(messages, AHEAD_BYTES):
        if sum(map(len, turn)) < HERE_BYTES:
            checked += _checked(turn, check)
            continue
        checking = asyncio.create_task(to_thread_to_end(_checked, turn, check))
        try:
            for each in checked:
                yield each
            checked = await checking
        finally:
            drop(checking)
    for each in checked:
        yield each


def _turn(messages: Iterator[Buffer], num_bytes: int) -> list[Buffer]:
    """The next messages, until they are that many bytes."""
    turn: list[Buffer] = []
    for message in messages:
        turn.append(message)
        num_bytes -= len(message)
        if num_bytes <= 0:
            break
    return turn


def _checked(messages: list[Buffer], check: Callable[[Buffer], T]) -> list[T]:
    return [check(message) for message in messages]
