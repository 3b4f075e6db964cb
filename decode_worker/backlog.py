"""Events that wait to be passed on, those of a sequence merged."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from decode_worker.sequence import Event
from tandem.output import OutputDelta

Name = TypeVar("Name", bound=Hashable)  # of a sequence


class Backlog(Generic[Name]):
    """In the order in which they came; tokens behind tokens of the same sequence are one event with them."""

    def __init__(self) -> None:
        self._events: list[tuple[Name, Event]] = []
        self._latest: dict[Name, int] = {}  # where the last event of a sequence is

    def put(self, news: Iterable[tuple[Name, Event]]) -> None:
        """Behind everything else of the same sequence."""
        for name, event in news:
            index = self._latest.get(name)
            before = self._events[index][1] if index is not None else None
            if index is not None and isinstance(before, OutputDelta) and isinstance(event, OutputDelta):
                self._events[index] = name, before.followed_by(event)
            else:
                self._latest[name] = len(self._events)
                self._events.append((name, event))

    def take(self) -> list[tuple[Name, Event]]:
        """All of them."""
        events, self._events = self._events, []
        self._latest.clear()
        return events
