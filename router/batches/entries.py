"""What a line of a queue asks for, wherever the queue is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast

from router.http.generation import Generation, parse_chat, parse_completion
from router.intake import Intake
from router.queue import MAX_PRIORITY
from tandem.chat_template import ChatTemplate
from tandem.errors import InvalidRequest
from tandem.offline.lines import CHAT_COMPLETIONS, BadLine, Entry
from tandem.request import Timings
from tandem.sampling import bad_param

LOWEST_PRIORITY = -MAX_PRIORITY  # everything else goes first


class Detokenizer(Protocol):
    """What reading needs to know of a model, where a line says `echo`."""

    def detokenize(self, token_ids: list[int]) -> str: ...


def read_entry(entry: Entry, template: Callable[[], ChatTemplate | None], texts: Detokenizer) -> Generation:
    """At the lowest priority there is. Raises `BAD_PARAM`.

    Without a seed a line gets one of its own: done again after a crash, its text is the same.
    """
    if entry.url == CHAT_COMPLETIONS:
        generation = parse_chat(entry.body, template())
    else:
        generation = parse_completion(entry.body, cast(Intake, texts))  # of it, only this
    if generation.stream:
        raise bad_param("`stream` has no meaning in a queue; leave it out")
    seed = int(entry.fingerprint[:15], 16)
    asks = [
        replace(
            ask,
            priority=LOWEST_PRIORITY,
            sampling=replace(ask.sampling, seed=seed) if ask.sampling.seed is None else ask.sampling,
        )
        for ask in generation.asks
    ]
    return replace(generation, asks=asks)


def check_entry(entry: Entry, read: Callable[[Entry], object]) -> None:
    """Raise `BadLine` if `read` refuses the entry: it can never be answered."""
    try:
        read(entry)
    except InvalidRequest as error:
        raise BadLine(error.reason, error.message, entry.custom_id) from error


def metrics_of(timings: Timings) -> dict[str, Any]:
    """Milliseconds by stage, and the time to the first token, as the service measured them."""
    ttft_ms = round(timings.queue_ms + timings.prefill_ms, 3)
    return {"ttft_ms": ttft_ms, **timings.milliseconds(), "placement": timings.placement}
