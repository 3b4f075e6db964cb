"""Lines of a batch as requests to the router they were left with."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

from router.batches.entries import check_entry, metrics_of, read_entry
from router.dispatch import Dispatcher
from router.flight import Flight
from router.http.choices import Choices
from router.http.generation import Generation
from router.intake import Intake
from router.interleave import interleave
from tandem.chat_template import ChatTemplate
from tandem.offline.lines import Entry
from tandem.offline.members import Answer


@dataclass(frozen=True, slots=True)
class RouterAsker:
    """Asks for one tenant, at the lowest priority there is."""

    dispatcher: Dispatcher
    intake: Intake
    template: ChatTemplate | None
    tenant: str

    def check(self, entry: Entry) -> None:
        """Raises `BadLine` for what can never be answered."""
        check_entry(entry, self._read)

    async def __call__(self, entry: Entry) -> Answer:
        """Raises `TandemError`; whoever is cancelled meanwhile leaves nothing running."""
        generation = self._read(entry)
        choices = Choices(generation, self.intake)
        flights: list[Flight] = []
        try:
            for ask in generation.asks:
                flights += self.dispatcher.start(await self.intake.requests(ask))
            async with aclosing(interleave(flights)) as events:
                async for index, event in events:
                    choices.take(index, event)
        finally:
            for flight in flights:
                flight.leave()
        body = choices.whole()
        tokens = body["usage"]["completion_tokens"]
        return Answer(generation.request_id, body, metrics_of(choices.slowest()), tokens)

    def _read(self, entry: Entry) -> Generation:
        return read_entry(entry, lambda: self.template, self.intake).of_caller(self.tenant, "")
