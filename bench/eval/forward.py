"""Forward cost: time against batch, against input and output length, with and without a KV cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.eval import published
from bench.eval.attempt import attempt
from bench.eval.experiment import Chart, Findings, Series, Settings
from bench.eval.models import parameters, target_of
from bench.forward.cells import Cell, measure, num_runs, obstacle
from bench.forward.rig import Rig
from bench.forward.run import FULL_KV_BYTES, free_bytes, room
from bench.measure import Meter, Sheet
from tandem.errors import ConfigError

NAME = "forward"
TITLE = "Forward cost"
BATCHES, TOKENS = (1, 2, 4, 8, 16), 256
INPUTS, NEW_TOKENS = tuple(1 << power for power in range(16)), 64
OUTPUTS, PROMPT = tuple(1 << power for power in range(9)), 64
SHORT, LONG, CACHE_TOKENS = 16, 1024, 32
Asked = tuple[int, tuple[int, ...], bool]  # prompt tokens, numbers of new tokens, with a cache?


@dataclass(frozen=True, slots=True)
class Row:
    """One forward, or one sequence from its prompt to its last new token."""

    target: str
    sweep: str  # batch | input | output | cache
    batch: int
    prompt_tokens: int
    new_tokens: int
    cache: bool
    seconds: float
    prefill_s: float  # of which the prompt, with the first new token


def run(settings: Settings) -> Findings:
    """Every sweep; lengths that memory or time has no room for are noted."""
    subject = target_of(settings)
    torch.set_num_threads(settings.threads)
    most = max(INPUTS) + NEW_TOKENS
    device = settings.device
    rig = Rig(subject.pair.target, device, room(subject.pair.target, most, FULL_KV_BYTES, device))
    cost = Cost(subject.name, rig, settings)
    with Meter(NAME, cost.num_steps) as meter:
        rows = list(cost.batches(meter))
        skipped: list[str] = []
        for name in ("output", "cache", "input"):
            found, missing = cost.sweep(name, meter)
            rows += found
            skipped += missing
    remarks = [
        f"{subject.name}: {parameters(subject)}, {rig.runner.describe()}. Sweeps but the first are of one "
        "sequence, run once; positions may pass the model's context, which costs the same.",
        published.FORWARD_SETTING,
        *skipped,
    ]
    return Findings({"rows": rows}, _sheets(rows), _charts(subject.name, rows), remarks)


class Cost:
    """A loaded model whose forwards are timed."""

    def __init__(self, target: str, rig: Rig, settings: Settings) -> None:
        self._target, self._rig, self._settings = target, rig, settings
        self._slowest_s, self._longest = 0.0, 1  # so far, and its prompt
        self._cells = [Cell("prefill", batch, TOKENS) for batch in BATCHES]

    @property
    def num_steps(self) -> int:
        """Of the meter."""
        return num_runs(self._cells, self._settings.rounds) + len(INPUTS) + 1 + 4

    def batches(self, meter: Meter) -> Iterator[Row]:
        """Forwards of whole prompts, in turns."""
        free = free_bytes(self._settings.device)
        timings, _ = measure(self._rig, self._cells, self._settings.rounds, free, meter)
        for timing in timings:
            seconds, batch = timing.seconds.median, timing.cell.batch
            yield Row(self._target, "batch", batch, TOKENS, 1, True, seconds, seconds)

    def sweep(self, name: str, meter: Meter) -> tuple[list[Row], list[str]]:
        """Whole outputs of one sequence, and what was not measured."""
        sweeps: dict[str, list[Asked]] = {
            "output": [(PROMPT, OUTPUTS, True)],
            "cache": [(p, (CACHE_TOKENS,), cache) for p in (SHORT, LONG) for cache in (True, False)],
            "input": [(prompt, (NEW_TOKENS,), True) for prompt in INPUTS],
        }
        wanted = {_label(name, one[0], one[2]): one for one in sweeps[name]}
        return attempt(wanted, lambda one: self._outputs(name, *one, meter), self._settings, meter)

    def _outputs(
        self, sweep: str, prompt: int, counts: Sequence[int], cache: bool, meter: Meter
    ) -> Iterable[Row]:
        """Raises `ConfigError` where memory or time has no room."""
        meter.step()
        expected_s = self._slowest_s * (prompt / self._longest) ** 2 if sweep == "input" else 0.0
        if expected_s > self._settings.left_s:
            raise ConfigError(f"it may take {expected_s:.0f} s, {self._settings.left_s:.0f} are left")
        cell = Cell("prefill", 1, prompt + max(counts))
        if why := obstacle(cell, self._rig, free_bytes(self._settings.device)):
            raise ConfigError(why)
        tokens = (self._rig.with_cache if cache else self._rig.without_cache)(prompt)
        times = list(itertools.islice(tokens, max(counts)))
        if sweep == "input":
            self._slowest_s, self._longest = sum(times), prompt
        return [
            Row(self._target, sweep, 1, prompt, count, cache, sum(times[:count]), times[0])
            for count in counts
        ]


def _label(sweep: str, prompt: int, cache: bool) -> str:
    return f"{sweep} sweep, {prompt} tokens in" + ("" if cache else ", without a cache")


def _of(rows: Sequence[Row], sweep: str) -> list[Row]:
    return [row for row in rows if row.sweep == sweep]


def _sheets(rows: Sequence[Row]) -> list[Sheet]:
    base, cached = _of(rows, "batch"), _of(rows, "cache")
    batch = [
        (
            *(str(row.batch), f"{1e3 * row.seconds:.2f}", f"{row.seconds / base[0].seconds:.2f}x"),
            *(f"{published.FORWARD_MS[row.batch]:.1f}", _over(published.FORWARD_MS, row.batch)),
        )
        for row in base
    ]
    cache = [
        (
            *(str(with_row.prompt_tokens), f"{1e3 * with_row.seconds:.1f}", f"{1e3 * row.seconds:.1f}"),
            *(f"{row.seconds / with_row.seconds:.1f}x", f"{published.UNCACHED_S / published.CACHED_S:.0f}x"),
        )
        for with_row, row in itertools.pairwise(cached)
        if with_row.cache and not row.cache
    ]
    columns = ("ms", "over the first", "published, s", "over the first")
    return [
        Sheet(f"one forward of S = {TOKENS}", ("batch", "ms", "over 1", "published, ms", "over 1"), batch, 0),
        Sheet(
            f"input length, {NEW_TOKENS} new tokens",
            ("prompt", "prefill, ms", "new tokens/s", *columns),
            [_length(row, row.prompt_tokens, published.INPUT_S, rows) for row in _of(rows, "input")],
            0,
        ),
        Sheet(
            f"output length, {PROMPT} tokens in",
            ("new tokens", "prefill, ms", "new tokens/s", *columns),
            [_length(row, row.new_tokens, published.OUTPUT_S, rows) for row in _of(rows, "output")],
            0,
        ),
        Sheet(
            f"KV cache, {CACHE_TOKENS} new tokens",
            ("prompt", "with, ms", "without, ms", "without / with", "published, 32k"),
            cache,
            0,
        ),
    ]


def _length(row: Row, length: int, theirs: Mapping[int, float], rows: Sequence[Row]) -> tuple[str, ...]:
    first = _of(rows, row.sweep)[0].seconds
    return (
        *(str(length), f"{1e3 * row.prefill_s:.1f}", f"{row.new_tokens / row.seconds:.1f}"),
        *(f"{1e3 * row.seconds:.1f}", f"{row.seconds / first:.2f}x"),
        *(f"{theirs[length]:g}" if length in theirs else "", _over(theirs, length)),
    )


def _over(theirs: Mapping[int, float], place: int) -> str:
    return f"{theirs[place] / theirs[1]:.2f}x" if place in theirs else ""


def _charts(target: str, rows: Sequence[Row]) -> list[Chart]:
    """Ratios to the first point of each sweep, and the published ones."""
    charts = []
    for sweep, below, theirs in (
        ("batch", f"sequences of {TOKENS} tokens", published.FORWARD_MS),
        ("input", f"prompt tokens, {NEW_TOKENS} new ones", published.INPUT_S),
        ("output", f"new tokens, {PROMPT} in", published.OUTPUT_S),
    ):
        found = _of(rows, sweep)
        places = [{"batch": r.batch, "input": r.prompt_tokens, "output": r.new_tokens}[sweep] for r in found]
        ours = Series("Tandem", places, [row.seconds / found[0].seconds for row in found])
        others = [theirs[place] / theirs[1] for place in theirs]
        series = [ours, Series("published", list(theirs), others, is_expected=True)]
        title = f"{target}: time over that of the first"
        charts.append(Chart(sweep, title, below, "ratio", series, is_log=True))
    return charts
