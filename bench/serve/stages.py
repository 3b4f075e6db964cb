"""Where the time of a request went, as spans: what the service measured, or what the client saw of it."""

from __future__ import annotations

from typing import NamedTuple

from bench.serve.record import RequestRecord

LATE_MS = 1.0  # to be sent, from which it is shown


class Stage(NamedTuple):
    """`parts` are the service's timings that make it up."""

    name: str
    parts: tuple[str, ...]
    colour: str  # a CSS variable's name


class Span(NamedTuple):
    """Seconds from the start of the run."""

    begin: float
    end: float
    colour: str


STAGES = (
    Stage("queue", ("queue_ms",), "queue"),
    Stage("prefill", ("prefill_ms",), "prefill"),
    Stage("transfer", ("kv_write_ms", "kv_wait_ms", "kv_read_ms"), "transfer"),
    Stage("decode", ("first_decode_ms", "decode_ms"), "decode"),
)


def spans_of(record: RequestRecord) -> list[Span]:
    """In order of time; without the service's timings only the first token parts them."""
    spans = [Span(record.scheduled_s, record.sent_s, "late")] if record.lag_ms > LATE_MS else []
    if not record.stages_ms:
        first_s = record.end_s if record.first_s is None else record.first_s
        return [*spans, Span(record.sent_s, first_s, "other"), Span(first_s, record.end_s, "decode")]
    now_s = record.sent_s
    for stage in STAGES:
        length_s = sum(record.stages_ms.get(part, 0.0) for part in stage.parts) / 1e3
        if length_s:
            spans.append(Span(now_s, now_s + length_s, stage.colour))
            now_s += length_s
    return spans
