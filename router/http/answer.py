"""One generating call over HTTP: its completions as one JSON object, or as server-sent events.

The status is sent with the first token, so that whatever is refused or fails before it has a status of
its own. From then on an error is an event of the stream. A caller that hangs up cancels everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.types import Receive, Scope, Send

from router.dispatch import Dispatcher
from router.flight import Flight
from router.http.choices import Choices
from router.http.errors import Json, as_tandem_error, error_object, json_bytes
from router.http.generation import Generation
from router.intake import Intake
from router.interleave import interleave

STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect tokens
)
DONE = b"data: [DONE]\n\n"


class Answer:
    """An ASGI response that runs the completions while it is sent."""

    def __init__(self, generation: Generation, dispatcher: Dispatcher, intake: Intake) -> None:
        self._generation = generation
        self._dispatcher = dispatcher
        self._intake = intake
        self._choices = Choices(generation, intake)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._flying(receive) as flights:
            if self._generation.stream:
                await self._stream(flights, send)
            else:
                await Json(await self._whole(flights))(scope, receive, send)

    @asynccontextmanager
    async def _flying(self, receive: Receive) -> AsyncIterator[list[Flight]]:
        """The flights of all completions, which end when the caller or this block does."""
        flights: list[Flight] = []

        def leave() -> None:
            for flight in flights:
                flight.leave()

        watcher = asyncio.create_task(_hung_up(receive))
        watcher.add_done_callback(lambda _: leave())
        try:
            for ask in self._generation.asks:
                flights += self._dispatcher.start(await self._intake.requests(ask))
            yield flights
        finally:
            leave()
            watcher.cancel()

    async def _whole(self, flights: Sequence[Flight]) -> dict[str, Any]:
        async with aclosing(interleave(flights)) as events:
            async for index, event in events:
                self._choices.take(index, event)
        return self._choices.whole()

    async def _stream(self, flights: Sequence[Flight], send: Send) -> None:
        has_begun = False
        try:
            async with aclosing(self._events(flights)) as events:
                async for event in events:
                    if not has_begun:
                        await send(_start())
                        has_begun = True
                    await send(_body(event))
        except Exception as error:
            if not has_begun:
                raise
            await send(_body(_event(error_object(as_tandem_error(error)))))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, flights: Sequence[Flight]) -> AsyncGenerator[bytes]:
        """Content as it comes, each choice's end by itself, the usage if asked for, the end."""
        shape, no_usage = self._generation.shape, {"usage": None} if self._generation.include_usage else {}
        head = self._choices.head(shape.chunk)
        async with aclosing(interleave(flights)) as events:
            async for index, event in events:
                part = self._choices.take(index, event)
                if part is not None:
                    yield _event({**head, "choices": [shape.delta(part)], **no_usage})
        if self._generation.include_usage:
            yield _event({**head, "choices": [], "usage": self._choices.usage()})
        yield DONE


async def _hung_up(receive: Receive) -> None:
    """Until the connection is gone. The body has been read to its end."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _start() -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)}


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"
