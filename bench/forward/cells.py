"""The forwards that are measured: which, how often, and what each found."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.forward.reference import Reference
from bench.forward.rig import Rig, prefill_bytes
from bench.measure import Meter, Spread, interleave
from bench.profile import record

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (16, 64, 256, 1024, 4096)
PROMPTS = tuple(1 << power for power in range(13))
FULL_PROMPTS = tuple(1 << power for power in range(16))
SLOW_PROMPT = 1024  # longer ones are run once
STEP_ROUNDS = 3  # a step is short: so many times the rounds of a prefill
OUTPUTS = tuple(1 << power for power in range(9))
SHORT, LONG = 16, 1024  # prompt tokens of the run without a cache
PATIENCE_S = 20.0  # that a run without a cache goes on
PEER_STEPS = ((1, 16), (1, 1024), (8, 256))  # batch, context
PEER_PROMPTS = (16, 128, 1024)
OURS, THEIRS = "Tandem", "transformers"
PROFILED_STEPS = 16


@dataclass(frozen=True, slots=True)
class Cell:
    """One forward."""

    phase: str  # decode | prefill
    batch: int
    tokens: int  # of context per sequence, or of each prompt


PROFILED = (
    *(Cell("decode", 1, 256), Cell("decode", 8, 256)),
    *(Cell("prefill", 1, 128), Cell("prefill", 1, 1024)),
)


@dataclass(frozen=True, slots=True)
class Timing:
    """What a cell took."""

    cell: Cell
    seconds: Spread


@dataclass(frozen=True, slots=True)
class Skipped:
    """A cell that was not measured."""

    cell: Cell
    why: str


@dataclass(frozen=True, slots=True)
class Output:
    """Seconds from a prompt to so many output tokens of one sequence."""

    prompt: int
    cache: bool
    output_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Beside:
    """One cell of ours and of transformers, in turns."""

    cell: Cell
    ours: Spread
    theirs: Spread
    ratio: Spread  # theirs over ours, within rounds


def cells(full: bool) -> list[Cell]:
    """Everything that is wanted, whether or not it fits."""
    steps = [Cell("decode", batch, context) for context in CONTEXTS for batch in BATCHES]
    return steps + [Cell("prefill", 1, length) for length in (FULL_PROMPTS if full else PROMPTS)]


def kv_tokens(cell: Cell) -> int:
    """Slots of the cache that it needs."""
    return cell.batch * (cell.tokens + 1 if cell.phase == "decode" else cell.tokens)


def obstacle(cell: Cell, rig: Rig, free_bytes: int) -> str | None:
    """Why a cell cannot be measured in this memory, or None."""
    needed = rig.runner.geometry.kv_bytes(kv_tokens(cell), rig.dtype)
    is_step = cell.phase == "decode"
    if not rig.fits(cell.tokens + is_step, cell.batch):
        return f"out of memory: {needed / 2**30:.2f} GiB of KV are more than the cache has"
    activations = 0 if is_step else prefill_bytes(rig.runner.geometry, cell.batch * cell.tokens)
    if activations > free_bytes:
        return (
            f"out of memory: its rows need {activations / 2**30:.2f} GiB, {free_bytes / 2**30:.2f} are free"
        )
    return None


def measure(
    rig: Rig, wanted: list[Cell], rounds: int, free_bytes: int, meter: Meter
) -> tuple[list[Timing], list[Skipped]]:
    """All cells in turns, those of one phase together; and those that memory has no room for.

    The first run of a cell tells whether it fits; of a long prompt it is the only one.
    """
    first: dict[Cell, float] = {}
    skipped: list[Skipped] = []
    for cell in wanted:
        meter.say(f"{cell.phase}: batch {cell.batch}, {cell.tokens} tokens")
        if why := obstacle(cell, rig, free_bytes):
            skipped.append(Skipped(cell, why))
        else:
            try:
                first[cell] = _arm(rig, cell)()
            except torch.OutOfMemoryError as error:
                skipped.append(Skipped(cell, f"out of memory: {str(error).partition('.')[0]}"))
        meter.step()
    timings = [Timing(cell, Spread.of([seconds])) for cell, seconds in first.items() if is_slow(cell)]
    for phase, times in (("decode", STEP_ROUNDS * rounds), ("prefill", rounds)):
        some = [cell for cell in first if cell.phase == phase and not is_slow(cell)]
        meter.say(phase)
        found = interleave({str(cell): _arm(rig, cell) for cell in some}, times, warm_ups=0, after=meter.step)
        timings += [Timing(cell, Spread.of(found[str(cell)])) for cell in some]
    return sorted(timings, key=lambda timing: wanted.index(timing.cell)), skipped


def is_slow(cell: Cell) -> bool:
    return cell.phase == "prefill" and cell.tokens > SLOW_PROMPT


def num_runs(wanted: list[Cell], rounds: int) -> int:
    """Forwards that `measure` takes if all cells fit."""
    again = [STEP_ROUNDS * rounds if c.phase == "decode" else rounds for c in wanted if not is_slow(c)]
    return len(wanted) + sum(again)


def outputs(rig: Rig, meter: Meter) -> Iterator[Output]:
    """Output lengths with and without a cache, for a short and a long prompt, until patience ends."""
    for prompt, cache in itertools.product((SHORT, LONG), (True, False)):
        meter.say(f"{prompt} tokens in, {'with' if cache else 'without'} a cache")
        if rig.fits(prompt + max(OUTPUTS)):
            yield from _follow(rig.with_cache if cache else rig.without_cache, prompt, cache)
        meter.step()


def _follow(run: Callable[[int], Iterator[float]], prompt: int, cache: bool) -> Iterator[Output]:
    began_s, passed_s = time.perf_counter(), 0.0
    for number, seconds in enumerate(run(prompt), 1):
        passed_s += seconds
        if number in OUTPUTS:
            yield Output(prompt, cache, number, passed_s)
        if number == max(OUTPUTS) or time.perf_counter() - began_s > PATIENCE_S:
            return


def beside(rig: Rig, reference: Reference, rounds: int, meter: Meter) -> Iterator[Beside]:
    """A few cells, each of both in turns."""
    chosen = [Cell("decode", *step) for step in PEER_STEPS]
    for cell in chosen + [Cell("prefill", 1, length) for length in PEER_PROMPTS]:
        meter.say("beside transformers")
        if rig.fits(cell.tokens + 1, cell.batch):
            arms = {OURS: _arm(rig, cell), THEIRS: _arm(reference, cell)}
            found = interleave(arms, rounds)
            ours, theirs = found[OURS], found[THEIRS]
            yield Beside(cell, Spread.of(ours), Spread.of(theirs), Spread.of_ratios(theirs, ours))
        meter.step()


def profile(rig: Rig, folder: Path) -> None:
    """Where the time of a few cells goes, in files of their own."""
    for cell in PROFILED:
        if rig.fits(cell.tokens + 1, cell.batch):
            label = f"{cell.phase}-batch-{cell.batch}-tokens-{cell.tokens}"
            record(folder, label, rig.runner, partial(_again, _arm(rig, cell)))


def _again(arm: Callable[[], float]) -> None:
    for _ in range(PROFILED_STEPS):
        arm()


def num_others() -> int:
    """Steps of the meter that `outputs` and `beside` take."""
    return 4 + len(PEER_STEPS) + len(PEER_PROMPTS)


def _arm(system: Rig | Reference, cell: Cell) -> Callable[[], float]:
    if cell.phase == "decode":
        return partial(system.decode, cell.batch, cell.tokens)
    return partial(system.prefill, cell.tokens, cell.batch)
