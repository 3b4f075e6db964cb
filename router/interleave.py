"""The events of several flights as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from router.flight import Flight
from router.flight_events import FlightEvent

Happening = tuple[int, FlightEvent]


class Alone:
    """The events of one flight, without a generator that every token would have to pass."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight

    def __aiter__(self) -> Alone:
        return self

    async def __anext__(self) -> Happening:
        return 0, await anext(self._flight)

    async def aclose(self) -> None:
        """Whoever followed it does so no more."""
        self._flight.leave()


def interleave(flights: Sequence[Flight]) -> Alone | AsyncGenerator[Happening]:
    """(index, event) of all flights, as they happen; the first error ends all. Close it in the end."""
    return Alone(flights[0]) if len(flights) == 1 else _several(flights)


async def _several(flights: Sequence[Flight]) -> AsyncGenerator[Happening]:
    # The flights know how much a slow client leaves unread; so nothing piles up here.
    merged: asyncio.Queue[Happening | Exception | None] = asyncio.Queue(1)

    async def forward(index: int) -> None:
        try:
            async for event in flights[index]:
                await merged.put((index, event))
            await merged.put(None)
        except Exception as error:
            await merged.put(error)
        finally:
            flights[index].leave()

    tasks = [asyncio.ensure_future(forward(index)) for index in range(len(flights))]
    try:
        num_left = len(flights)
        while num_left:
            item = await merged.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
