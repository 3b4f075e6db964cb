"""From prefill's last step to decode's first, with and without transfer in the middle of forwards."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.embedded import serving
from bench.measure import Spread, interleave
from tandem.client import TandemClient
from tandem.sampling import SamplingParams

CASES = ((1024, 1024), (1920, 480))  # prompt tokens, and those of one chunk


@dataclass(frozen=True, slots=True)
class HandOff:
    """Milliseconds of one request on an idle service, as its answer reports them.

    `gap_ms` is what the client waits between the first token and KV in place on the decode worker.
    """

    prompt_tokens: int
    chunks: int
    overlap: bool  # KV leaves in the middle of forwards; else between them
    prefill_ms: Spread
    gap_ms: Spread
    gap_of_prefill: Spread
    transfer_ms: Spread
    hidden: Spread  # share of transfer_ms that nobody waited for


def measure(rounds: int) -> list[HandOff]:
    """The bundled model: a service that always overlaps and one with defaults take turns at new prompts."""
    return [row for case in CASES for row in _case(*case, rounds)]


def _case(prompt_tokens: int, chunk_tokens: int, rounds: int) -> list[HandOff]:
    rng = random.Random(0)
    with ExitStack() as stack, asyncio.Runner() as runner:
        arms: dict[str, Callable[[], Any]] = {}
        for name, values in (("on", {"overlap": "always"}), ("off", {})):
            settings = {"kvstore": values, "prefill": {"token_budget": chunk_tokens}}
            address = stack.enter_context(serving(settings))
            arms[name] = partial(_ask, runner, address, rng, prompt_tokens)
        found = interleave(arms, rounds, warm_ups=2)
    chunks = -(-prompt_tokens // chunk_tokens)
    row = partial(_row, prompt_tokens, chunks)
    return [row(name == "on", timings) for name, timings in found.items()]


def _row(prompt_tokens: int, chunks: int, overlap: bool, timings: Sequence[Any]) -> HandOff:
    gaps = [each.kv_write_ms + each.kv_wait_ms + each.kv_read_ms for each in timings]
    prefills = [each.prefill_ms for each in timings]
    return HandOff(
        prompt_tokens,
        chunks,
        overlap,
        prefill_ms=Spread.of(prefills),
        gap_ms=Spread.of(gaps),
        gap_of_prefill=Spread.of_ratios(gaps, prefills),
        transfer_ms=Spread.of(each.transfer_ms for each in timings),
        hidden=Spread.of(each.transfer_hidden for each in timings),
    )


def _ask(runner: asyncio.Runner, address: str, rng: random.Random, num_tokens: int) -> Any:
    return runner.run(_timings(address, [rng.randrange(3, 1000) for _ in range(num_tokens)]))


async def _timings(address: str, prompt: list[int]) -> Any:
    async with TandemClient(address) as client:
        async for event in client.stream(prompt, SamplingParams(max_tokens=4, ignore_eos=True)):
            if event.WhichOneof("event") == "finished":
                return event.finished.timings
    raise AssertionError("a stream that did not fail ends with Finished")
