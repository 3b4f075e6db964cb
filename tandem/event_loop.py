"""The event loop of a process that serves: uvloop, closed when gRPC's handlers have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")

HANDLERS_END_S = 2.0
_HANDLER = "_schedule_rpc_coro"  # what grpc.aio runs each call in


def runner() -> asyncio.Runner:
    """For several coroutines one after another on the same loop."""
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` for what starts and stops gRPC servers."""
    with runner() as loop:
        return loop.run(_to_its_end(main))


async def _to_its_end(main: Coroutine[Any, Any, T]) -> T:
    """A server's `stop` cancels calls without waiting for their handlers; a loop that closes meanwhile
    cancels gRPC's own tasks, and each of these prints a traceback."""
    try:
        return await main
    finally:
        tasks = asyncio.all_tasks()
        if handlers := {task for task in tasks if getattr(task.get_coro(), "__name__", "") == _HANDLER}:
            await asyncio.wait(handlers, timeout=HANDLERS_END_S)
