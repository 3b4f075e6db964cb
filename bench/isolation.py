"""Prefill and decode on the cores of one machine: what long prompts cost those who read. Part of
`tandem bench split`.

Five services take turns at the same work, round by round. Prefill and decode apart:

    shared  workers that compute together split the cores, one that computes alone has them all (the default)
    halves  half of the cores' number of threads each, always
    all     as many threads as cores each, always, wherever the machine runs them

and together, on one worker with as many threads as cores:

    chunks  prompts between steps in chunks that take about 30 ms
    whole   prompts between steps in one piece

The work: a batch of sequences while no prompt comes; a long prompt while nothing is decoded; and the same
batch while one long prompt after the other comes, where the gaps between tokens show what prompts cost those
who read. Without speculation: a gap is a token.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from bench.embedded import serving
from bench.measure import Sheet, interleave
from bench.serve.metrics import nearest_rank
from tandem.client import TandemClient
from tandem.sampling import SamplingParams

SEQUENCES = 4
PROMPT_TOKENS, OUTPUT_TOKENS = 96, 192
LONG_TOKENS = 1536
PROMPT_CODES = range(7, 251)  # token ids that any vocabulary has
ROUNDS = 5
UNCHUNKED: Mapping[str, Any] = {"prefill_tokens": 1 << 14, "stall_s": 1e6}
PLAIN: Mapping[str, Any] = {"speculation": {"draft": "none"}}


@dataclass(frozen=True, slots=True)
class Turn:
    """One service at all of the work, once."""

    alone: list[float]  # gaps between tokens, ms, of all sequences while no prompt comes
    alone_tokens_per_s: float
    long_ms: float  # until the first token of a long prompt, while nothing is decoded
    beside: list[float]  # gaps while long prompts come
    beside_tokens_per_s: float
    prompts_per_s: float  # long ones, meanwhile


@dataclass(frozen=True, slots=True)
class Row:
    """One service. Medians of rounds; percentiles of a round's gaps, in ms."""

    mode: str
    alone_tokens_per_s: float
    alone_itl_p99: float
    long_ttft: float
    beside_tokens_per_s: float
    beside_itl_p50: float
    beside_itl_p99: float
    prompts_per_s: float


def modes(cores: int) -> dict[str, dict[str, Any]]:
    """Settings of the services, by name."""
    return {
        "shared": {},
        "halves": _threads(max(cores // 2, 1)),
        "all": _threads(cores),
        "chunks": together(cores),
        "whole": together(cores, **UNCHUNKED),
    }


def together(threads: int, **decode: Any) -> dict[str, Any]:
    """Settings of a service that computes prompts between the steps of its decode worker."""
    return {"router": {"disaggregate": "never"}, "decode": {"threads": threads, **decode}}


def measure(models: Mapping[str, Any] | None = None) -> list[Row]:
    """All services, `ROUNDS` times. `models` is the part of a configuration that names models."""
    arms = modes(len(os.sched_getaffinity(0)))
    with ExitStack() as stack, asyncio.Runner() as runner:
        addresses = {
            mode: stack.enter_context(serving({**(models or {}), **PLAIN, **values}))
            for mode, values in arms.items()
        }
        turns = {mode: partial(_run, runner, address) for mode, address in addresses.items()}
        found = interleave(turns, ROUNDS)
    return [_row(mode, turns) for mode, turns in found.items()]


def _threads(number: int) -> dict[str, Any]:
    return {"prefill": {"threads": number}, "decode": {"threads": number}}


def _run(runner: asyncio.Runner, address: str) -> Turn:
    return runner.run(_turn(address))


async def _turn(address: str) -> Turn:
    async with TandemClient(address) as client:
        alone, alone_s = await _batch(client)
        began_s = time.perf_counter()
        await _long(client)
        long_ms = 1e3 * (time.perf_counter() - began_s)
        finished: list[float] = []
        coming = asyncio.create_task(_keep_coming(client, finished))
        try:
            beside, beside_s = await _batch(client)
        finally:
            coming.cancel()
            await asyncio.wait({coming})
        tokens = SEQUENCES * OUTPUT_TOKENS
        return Turn(alone, tokens / alone_s, long_ms, beside, tokens / beside_s, len(finished) / beside_s)


async def _batch(client: TandemClient) -> tuple[list[float], float]:
    """All gaps of some sequences that run together, ms; seconds until the last has ended."""
    began_s = time.perf_counter()
    gaps = await asyncio.gather(*(_gaps(client, number) for number in range(SEQUENCES)))
    return [gap for some in gaps for gap in some], time.perf_counter() - began_s


async def _gaps(client: TandemClient, number: int) -> list[float]:
    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    events = client.stream(_prompt(PROMPT_TOKENS, number), sampling)
    arrivals = [time.perf_counter() async for event in events if event.HasField("token_chunk")]
    return [1e3 * (after - before) for before, after in itertools.pairwise(arrivals)]


async def _long(client: TandemClient) -> None:
    await client.generate(_prompt(LONG_TOKENS, 0), SamplingParams(max_tokens=1))


async def _keep_coming(client: TandemClient, finished: list[float]) -> None:
    """One long prompt after the other."""
    while True:
        await _long(client)
        finished.append(time.perf_counter())


def _prompt(length: int, start: int) -> list[int]:
    return [PROMPT_CODES[(start + 7 * i + i * i) % len(PROMPT_CODES)] for i in range(length)]


def _row(mode: str, turns: Sequence[Turn]) -> Row:
    return Row(
        mode,
        median(turn.alone_tokens_per_s for turn in turns),
        median(nearest_rank(turn.alone, 99) for turn in turns),
        median(turn.long_ms for turn in turns),
        median(turn.beside_tokens_per_s for turn in turns),
        median(nearest_rank(turn.beside, 50) for turn in turns),
        median(nearest_rank(turn.beside, 99) for turn in turns),
        median(turn.prompts_per_s for turn in turns),
    )


def sheet(rows: Sequence[Row]) -> Sheet:
    """All services; latencies in ms."""
    columns = ("cores", "tokens/s alone", "ITL p99", "long prompt alone", "tokens/s beside", "ITL p50", "p99")
    cells = [
        (
            row.mode,
            *(f"{row.alone_tokens_per_s:.0f}", f"{row.alone_itl_p99:.1f}", f"{row.long_ttft:.0f}"),
            *(f"{row.beside_tokens_per_s:.0f}", f"{row.beside_itl_p50:.1f}", f"{row.beside_itl_p99:.1f}"),
            f"{row.prompts_per_s:.2f}",
        )
        for row in rows
    ]
    title = f"{SEQUENCES} sequences alone, and beside prompts of {LONG_TOKENS} tokens"
    return Sheet(title, (*columns, "prompts/s"), cells, 1)
