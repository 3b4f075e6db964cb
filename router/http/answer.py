"""One generating call over HTTP: its completions as one JSON object, or as server-sent events.

The status is sent with the first token, so that whatever is refused or fails before it has a status of
its own. From then on an error is an event of the stream. A caller that hangs up cancels everything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.types import Receive, Scope, Send

from router.dispatch import Dispatcher
from router.flight import Admitted, Completed, Flight, FlightEvent
from router.http.errors import Json, as_tandem_error, error_object, json_bytes
from router.http.generation import Generation
from router.http.logprobs import Logprobs, LogprobsReader
from router.http.shapes import Part, usage_json
from router.intake import Intake
from router.interleave import interleave
from tandem.errors import Cancelled
from tandem.output import OutputDelta
from tandem.request import Usage

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
        self._created = int(time.time())
        self._choices: list[_Choice] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._flying(receive) as flights:
            self._choices = [_Choice(index, self._generation, self._intake) for index in range(len(flights))]
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
                flight.cancel(Cancelled())

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
                self._choices[index].take(event)
        shape = self._generation.shape
        return {
            **self._head(shape.whole),
            "choices": [shape.choice(choice.whole()) for choice in self._choices],
            "usage": self._usage(),
        }

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
        head = self._head(shape.chunk)
        async with aclosing(interleave(flights)) as events:
            async for index, event in events:
                part = self._choices[index].take(event)
                if part is not None:
                    yield _event({**head, "choices": [shape.delta(part)], **no_usage})
        if self._generation.include_usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._generation.request_id,
            "object": kind,
            "created": self._created,
            "model": self._intake.model_name,
        }

    def _usage(self) -> dict[str, Any]:
        return usage_json([choice.usage for choice in self._choices], self._generation.num_choices)


class _Choice:
    """One completion: what it adds with each event, and what it is in the end."""

    def __init__(self, index: int, generation: Generation, intake: Intake) -> None:
        self.usage = Usage()
        self._index = index
        self._echo = generation.echoes[index // generation.num_choices]
        self._reader = LogprobsReader(intake.token_bytes) if generation.has_logprobs else None
        self._keeps_ids = generation.return_token_ids
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._end: Completed | None = None
        self._has_begun = False

    def take(self, event: FlightEvent) -> Part | None:
        """What a stream says of this event; None if that is nothing."""
        if isinstance(event, Admitted):
            return None
        is_first, self._has_begun = not self._has_begun, True
        if isinstance(event, Completed):
            self.usage, self._end = event.usage, event
            return Part(
                index=self._index,
                finish=event.delta.finish,
                matched_stop=event.delta.matched_stop,
                is_first=is_first,
            )
        part = self._added(event, is_first)
        # A character that is not complete, or what may become a stop string, is told with what follows.
        return part if is_first or part.text or self._reader or self._keeps_ids else None

    def whole(self) -> Part:
        """Everything; the completion is over."""
        assert self._end is not None
        return Part(
            index=self._index,
            text="".join(self._texts),
            token_ids=self._token_ids if self._keeps_ids else None,
            logprobs=self._logprobs if self._reader else None,
            finish=self._end.delta.finish,
            matched_stop=self._end.delta.matched_stop,
        )

    def _added(self, delta: OutputDelta, is_first: bool) -> Part:
        text = self._echo + delta.text if is_first else delta.text
        logprobs = self._reader.read(delta) if self._reader else None
        self._texts.append(text)
        self._token_ids += delta.token_ids
        self._logprobs += logprobs or ()
        return Part(
            index=self._index,
            text=text,
            token_ids=delta.token_ids if self._keeps_ids else None,
            logprobs=logprobs,
            is_first=is_first,
        )


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
