"""The choices of one generating call: what each adds with an event, and the whole answer in the end."""

from __future__ import annotations

import time
from typing import Any

from router.flight_events import Admitted, Completed, FlightEvent
from router.http.generation import Generation
from router.http.logprobs import Logprobs, LogprobsReader
from router.http.shapes import Part, usage_json
from router.intake import Intake
from tandem.output import OutputDelta
from tandem.request import Timings, Usage


class Choices:
    """Takes the events of a call's flights, in whatever order the flights bring them."""

    def __init__(self, generation: Generation, intake: Intake) -> None:
        count = len(generation.asks) * generation.num_choices
        self._choices = [_Choice(index, generation, intake) for index in range(count)]
        self._generation = generation
        self._model = intake.model_name
        self._created = int(time.time())

    def take(self, index: int, event: FlightEvent) -> Part | None:
        """What a stream says of this event; None if that is nothing."""
        return self._choices[index].take(event)

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of this answer begins with."""
        return {
            "id": self._generation.request_id,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    def usage(self) -> dict[str, Any]:
        return usage_json([choice.usage for choice in self._choices], self._generation.num_choices)

    def whole(self) -> dict[str, Any]:
        """The answer as one object; all completions are over."""
        shape = self._generation.shape
        return {
            **self.head(shape.whole),
            "choices": [shape.choice(choice.whole()) for choice in self._choices],
            "usage": self.usage(),
        }

    def slowest(self) -> Timings:
        """Where the time of the completion that took longest went."""
        return max((choice.timings() for choice in self._choices), key=lambda timings: timings.total_ms)


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

    def timings(self) -> Timings:
        assert self._end is not None
        return self._end.timings

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
