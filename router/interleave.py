"""The events of several flights as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from router.flight import Flight
from router.flight_events import FlightEvent


async def interleave(flights: Sequence[Flight]) -> AsyncGenerator[tuple[int, FlightEvent]]:
    """(index, event) of all flights, as they happen; the first error ends all."""
    if len(flights) == 1:
        async with aclosing(flights[0].events()) as events:
            async for event in events:
                yield 0, event
        return
    # The flights know how much a slow client leaves unread; so nothing piles up here.
    merged: asyncio.Queue[tuple[int, FlightEvent] | Exception | None] = asyncio.Queue(1)

    async def forward(index: int) -> None:
        try:
            async with aclosing(flights[index].events()) as events:
                async for event in events:
                    await merged.put((index, event))
            await merged.put(None)
        except Exception as error:
            await merged.put(error)

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
