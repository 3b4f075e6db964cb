"""What a client of the store does about time and loss: connect quickly or not at all, name each failure."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from tandem.errors import DeadlineExceeded, TandemError, Unavailable
from tandem.rpc import to_tandem_error

CONNECT_S = 1.0
# Metadata of a put. Its writer says MAY_PLACE if it may share a host with the store; the store answers
# RESERVED with its epoch when the bytes are there, and FILE if the writer may fill that by itself. MAY_MAP
# is the same of a reader that follows an object: FILE is where it reads.
MAY_PLACE, MAY_MAP, RESERVED, FILE = "kv-may-place", "kv-may-map", "kv-reserved", "kv-file"
REPLACEMENT = "Internal error from Core"  # grpc.aio, when a write fails

# What gRPC itself answers when the peer is gone, depending on where in the call that was noticed.
_LOST = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
    }
)


def store_down() -> Unavailable:
    return Unavailable("STORE_DOWN", "KV store is unavailable")


async def connected(channel: grpc.aio.Channel) -> None:
    """Return once the channel is connected. STORE_DOWN at once if that fails, and in any case after 1 s."""
    try:
        async with asyncio.timeout(CONNECT_S):
            while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                if state in (
                    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
                    grpc.ChannelConnectivity.SHUTDOWN,
                ):
                    raise store_down()
                await channel.wait_for_state_change(state)
    except TimeoutError:
        raise store_down() from None


@contextmanager
def store_errors() -> Iterator[None]:
    """Whatever a call raises leaves as the `TandemError` it means."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _meaning(error) from error
    except TimeoutError:
        raise DeadlineExceeded("transfer") from None


def drop(task: asyncio.Task[Any]) -> None:
    """Nobody wants to know how it ends."""
    if not task.cancel() and not task.cancelled():
        task.exception()


class Ending:
    """How a call with a stream of writes ended. When a write fails just as the peer's status arrives,
    grpc.aio puts an error of its own in its place, in either order; this keeps the peer's."""

    def __init__(self, call: Any) -> None:
        self.error: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        """Called inside grpc for every status it sets, when that can be had without waiting."""
        code, details = _now(call.code()), _now(call.details())
        if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED) and details != REPLACEMENT:
            trailing = _now(call.trailing_metadata())
            self.error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


def _now(ready: Coroutine[Any, Any, Any]) -> Any:
    try:
        ready.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the status of a call that has ended is known")


def _meaning(error: grpc.aio.AioRpcError) -> TandemError:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return to_tandem_error(error, DeadlineExceeded("transfer"))
    return to_tandem_error(error, store_down() if error.code() in _LOST else None)
