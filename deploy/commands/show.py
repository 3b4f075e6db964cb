"""What a person sees of a request: its text as it comes, then where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from tandem.client import TandemClient
from tandem.output import FINISH_FROM_PB
from tandem.pb.v1 import generation_pb2 as pb
from tandem.request import Timings

STAGES = (
    ("queue", "queue_ms", "waited until its memory was there"),
    ("prefill", "prefill_ms", "computed the prompt, sampled the first token"),
    ("KV write", "kv_write_ms", "sent the rest of the KV to the store"),
    ("KV wait", "kv_wait_ms", "handed over to the decode worker"),
    ("KV read", "kv_read_ms", "fetched and checked the KV"),
    ("first decode", "first_decode_ms", "until the second token"),
    ("decode", "decode_ms", "all other tokens"),
)


async def stream_text(
    client: TandemClient, prompt: str | Sequence[int], out: TextIO, **options: Any
) -> pb.Finished:
    """Print prompt and completion as it arrives; returns how it ended."""
    shown = prompt if isinstance(prompt, str) else ""
    async for event in client.stream(prompt, **options):
        if event.WhichOneof("event") == "admitted":
            out.write(shown)
            shown = ""  # a request that is planned again is admitted again
        elif event.WhichOneof("event") == "token_chunk":
            out.write(event.token_chunk.text)
            out.flush()
        elif event.WhichOneof("event") == "finished":
            out.write("\n")
            out.flush()
            return event.finished
    raise AssertionError("a stream that did not fail ends with Finished")


def show_timings(finished: pb.Finished, console: Console) -> None:
    """The anatomy of one request as a table."""
    table = Table(title="where the time went", title_justify="left", box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("ms", justify="right")
    table.add_column("", style="dim")
    for name, field, meaning in STAGES:
        table.add_row(name, f"{getattr(finished.timings, field):.1f}", meaning)
    if hidden := finished.timings.transfer_hidden:
        what = f"of {finished.timings.transfer_ms:.1f} ms of transfer hidden behind prefill"
        table.add_row("", f"{100 * hidden:.0f} %", what)
    usage, total_ms = finished.usage, finished.timings.total_ms
    table.add_row("total", f"{total_ms:.1f}", f"{usage.prompt} prompt + {usage.completion} output tokens")
    console.print(table)


def summary(finished: pb.Finished) -> str:
    """One line about how a completion ended."""
    timings, usage = finished.timings, finished.usage
    first_ms = timings.queue_ms + timings.prefill_ms
    rest_s = max(timings.total_ms - first_ms, 1e-3) / 1e3
    rate = f", {(usage.completion - 1) / rest_s:.0f} tokens/s after it" if usage.completion > 1 else ""
    reason = FINISH_FROM_PB[finished.reason]
    if usage.drafted:
        rate += f", {usage.accepted} of {usage.drafted} draft tokens accepted"
    ended = reason.value if reason else "unknown"
    return f"{usage.completion} tokens ({ended}), first after {first_ms:.0f} ms{rate}"


def _usage(usage: pb.Usage) -> dict[str, Any]:
    """Counts by name; what speculation did is an object of its own, or null."""
    counts = {spec.name: getattr(usage, spec.name) for spec in usage.DESCRIPTOR.fields}
    speculation = {
        spec.name: list(value) if spec.is_repeated else value
        for spec in usage.speculation.DESCRIPTOR.fields
        for value in [getattr(usage.speculation, spec.name)]
    }
    return counts | {"speculation": speculation if usage.HasField("speculation") else None}


def as_json(text: str, token_ids: Sequence[int], finished: pb.Finished) -> dict[str, Any]:
    """A completion in the stable keys that scripts rely on."""
    reason = FINISH_FROM_PB[finished.reason]
    which = finished.WhichOneof("matched_stop")
    timings = Timings.from_pb(finished.timings)
    return {
        "text": text,
        "token_ids": list(token_ids),
        "finish_reason": reason.value if reason else None,
        "matched_stop": getattr(finished, which) if which else None,
        "usage": _usage(finished.usage),
        "timings": {
            **timings.milliseconds(),
            "transfer_hidden": round(timings.transfer_hidden, 3),
            "placement": timings.placement,
        },
    }
