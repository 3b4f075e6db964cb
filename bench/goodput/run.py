"""The largest rate each server holds within limits, limits by limits, all servers on the same cores in turns.

1. vLLM's servers start and are put to sleep. Ours starts when it is its turn.
2. For each pair of limits, the loosest first, all servers are searched side by side for the largest Poisson
   rate at which enough requests keep them (bench/serve/search.py): one runs one trial of its own search, then
   the next does, so that a slow hour of the machine is everybody's. vLLM's trials within looser limits are
   not run again.
3. When a search ends, what is found is written at once, so that whoever stops it has what was measured.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.goodput.report import Finds, Row, rows_of, sheet
from bench.goodput.systems import System, tandem, vllm
from bench.measure import console, flat, machine, table, write_csv, write_json
from bench.serve.arrivals import Arrival, Schedule
from bench.serve.metrics import Slo
from bench.serve.record import Outcome
from bench.serve.search import Found
from bench.serve.session import LoadTest, Model, Options, Run, Runs, search_rates
from bench.shapes import checkpoint
from bench.vllm.peer import Settings
from bench.vllm.server import SERVED_NAME
from tandem.config import BUNDLED_MODELS, ModelConfig
from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry

INPUT_TOKENS, MAX_INPUT_TOKENS = "mix:128*4,1024", 1024  # one long prompt in five
OUTPUT_TOKENS = 64
SEED = 41  # by which it is one in five of the first 20, 30 and 40 requests, too
MAX_SEQUENCES = 64  # of vLLM at once: more than any limit here leaves time for
BASE = "Tandem"


@dataclass(frozen=True, slots=True)
class Load:
    """Where searches begin, and limits by name, each at least as tight as the one before."""

    first_rate: float  # requests per second
    limits: Mapping[str, Slo]


LOADS = {
    "raw": Load(
        4.0,
        {
            "loose": Slo(ttft_ms=2000, itl_ms=250),
            "middle": Slo(ttft_ms=1000, itl_ms=100),
            "tight": Slo(ttft_ms=500, itl_ms=50),
        },
    ),
    "111m": Load(
        0.5,
        {
            "loose": Slo(ttft_ms=10_000, itl_ms=1000),
            "middle": Slo(ttft_ms=5000, itl_ms=250),
            "tight": Slo(ttft_ms=3000, itl_ms=100),
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare, and for how long."""

    shape: str
    vllm_python: Path | None
    step_tokens: Sequence[int | None]  # of one vLLM each: most that a step of it computes; None: its default
    with_speculation: bool
    num_requests: int
    trials: int
    minutes: float
    out: Path
    limits: Sequence[str] = ()  # names of those to search within; none: all
    quantizations: Sequence[str] = ()  # of one more of ours each


def run(comparison: Comparison, as_json: bool) -> dict[str, Any]:
    """Measure, write, show; the document that was written. Raises `ConfigError`."""
    load = _load(comparison)
    path = checkpoint(comparison.shape)
    model = Model(SERVED_NAME, ModelGeometry.from_path(path).vocab_size, MAX_INPUT_TOKENS + OUTPUT_TOKENS)
    deadline_s = time.monotonic() + 60 * comparison.minutes
    head, rows = _head(comparison), list[Row]()
    content = head | {"rows": [], "trials": [], "skipped": list(load.limits)}
    with ExitStack() as stack:
        systems = _systems(comparison, path, stack)

        def write(found: Finds) -> None:
            nonlocal rows, content
            rows = rows_of(found, load.limits, list(systems))
            content = head | _results(rows, found, load)
            write_csv(comparison.out / "goodput.csv", content["rows"])
            write_json(comparison.out / "goodput.json", content)

        try:
            asyncio.run(measure(systems, load, model, _options(comparison, load), deadline_s, write))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    _show(comparison, rows, content["skipped"], console(as_json))
    return content


async def measure(
    systems: Mapping[str, System],
    load: Load,
    model: Model,
    options: Options,
    deadline_s: float,
    note: Callable[[Finds], None],
) -> None:
    """All searches, in turns; `note` hears of all that is found whenever one ends.

    From `deadline_s` on the monotonic clock on no rate is tried that was not begun, and no further limits.
    SIGTERM cancels it: by the loop, as what a handler raises may be raised where nobody hears it.
    """
    measuring = asyncio.current_task()
    assert measuring is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, measuring.cancel)
    runs: dict[str, Runs] = {name: {} for name in systems}
    found: dict[tuple[str, str], Found] = {}

    def has_time() -> bool:
        return time.monotonic() < deadline_s

    for label, slo in load.limits.items():
        if not has_time():
            break
        runs |= {name: {} for name, system in systems.items() if system.follows_limits}
        turn, limited = asyncio.Lock(), replace(options, slo=slo)  # the lock is had in the order of asking
        searches = []  # tasks, so that they ask in the systems' order
        for name, system in systems.items():
            trial = partial(_in_turn, turn, system, model, limited)
            search = _search(name, label, trial, limited, runs[name], has_time)
            searches.append(asyncio.create_task(search))
        for ended in asyncio.as_completed(searches):
            name, found[label, name] = await ended
            note(found)


async def _search(
    name: str,
    label: str,
    trial: Callable[[float, int], Awaitable[Run]],
    options: Options,
    runs: Runs,
    has_time: Callable[[], bool],
) -> tuple[str, Found]:
    found = await search_rates(options, trial, runs, has_time, f"{name}, {label} limits: ")
    _check_answered(name, runs)
    return name, found


async def _in_turn(
    turn: asyncio.Lock, system: System, model: Model, options: Options, rate: float, number: int
) -> Run:
    """One trial, alone on the machine and warmed up."""
    async with turn:
        with system.awake(options.slo) as target:
            test = LoadTest(target, model, options)
            await test.warm_up()
            return await test.trial(rate, number)


def _check_answered(name: str, runs: Runs) -> None:
    """A server that refuses everything is no slow one. Raises `ConfigError`."""
    records = [record for run in runs.values() for record in run.records]
    if not any(record.outcome is Outcome.OK for record in records):
        raise ConfigError(f"{name} answered no request: {records[0].error}")


def _load(comparison: Comparison) -> Load:
    if comparison.shape not in LOADS:
        raise ConfigError(f"there are limits for the shapes {', '.join(LOADS)}, none for {comparison.shape}")
    if comparison.with_speculation and comparison.shape != "raw":
        raise ConfigError(
            "random weights have no draft that agrees with them: --speculation needs --shape raw"
        )
    load, wanted = LOADS[comparison.shape], comparison.limits
    if unknown := [name for name in wanted if name not in load.limits]:
        raise ConfigError(f"there are limits named {', '.join(load.limits)}, none named {', '.join(unknown)}")
    for name in comparison.quantizations:
        ModelConfig(quantization=name)  # says what there is
    return replace(
        load, limits={name: slo for name, slo in load.limits.items() if name in wanted or not wanted}
    )


def _options(comparison: Comparison, load: Load) -> Options:
    return Options(
        num_requests=comparison.num_requests,
        arrival=Schedule(Arrival.POISSON, load.first_rate),
        input_lengths=INPUT_TOKENS,
        output_lengths=str(OUTPUT_TOKENS),
        trials=comparison.trials,
        warm_up=2,  # of each trial
        seed=SEED,
    )


def _systems(comparison: Comparison, path: Path, stack: ExitStack) -> dict[str, System]:
    """Ourselves and, where a Python has it, vLLM. Raises `ConfigError` if that cannot run."""
    plainly = {"draft": "none"}
    systems = {BASE: tandem(path, plainly)}
    for name in comparison.quantizations:
        systems[f"{BASE}, {name} weights"] = tandem(path, plainly, name)
    if comparison.with_speculation:
        draft = {"draft": "model", "draft_path": str(BUNDLED_MODELS / "draft")}
        systems[f"{BASE}, speculating"] = tandem(path, draft)
    if comparison.vllm_python is not None:
        plain = Settings(str(path), _num_cores(), MAX_SEQUENCES, max_tokens=MAX_INPUT_TOKENS + OUTPUT_TOKENS)
        engines = {
            f"vLLM, steps of {count} tokens" if count else "vLLM": replace(plain, step_tokens=count)
            for count in comparison.step_tokens
        }
        systems |= vllm(comparison.vllm_python, engines, stack)
    return systems


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _head(comparison: Comparison) -> dict[str, Any]:
    """What is known before anything is measured."""
    return {
        "machine": machine(_num_cores()),
        "shape": comparison.shape,
        "load": {
            "arrivals": "poisson",
            "input_tokens": INPUT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "requests": comparison.num_requests,
            "trials": comparison.trials,
        },
    }


def _results(rows: Sequence[Row], found: Finds, load: Load) -> dict[str, Any]:
    return {
        "rows": [flat(row) for row in rows],
        "trials": [
            {"limits": label, "system": name, **asdict(trial)}
            for (label, name), one in found.items()
            for trial in one.trials
        ],
        "skipped": [label for label in load.limits if label not in {row.limits for row in rows}],
    }


def _show(comparison: Comparison, rows: Sequence[Row], skipped: Sequence[str], shown: Console) -> None:
    title = (
        f"{comparison.shape}, over HTTP, {_num_cores()} cores; prompts {INPUT_TOKENS}, {OUTPUT_TOKENS} out, "
        f"{comparison.trials} x {comparison.num_requests} requests a rate; the largest Poisson rate "
        f"at which 90 % keep the limits, and {BASE}'s over it"
    )
    shown.print(table(*sheet(title, rows)))
    if any(row.client_late for row in rows):
        shown.print("*: the load test, on the same cores, was more than 10 ms late to send some requests")
    for label in skipped:
        shown.print(f"not measured: {label} limits, for want of time")
    shown.print(f"\ngoodput.csv and goodput.json are in {comparison.out}")
