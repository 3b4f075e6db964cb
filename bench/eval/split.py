"""Split against unsplit on the same cores: latencies and goodput under mixed load, and where either loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.embedded import models_of
from bench.eval.experiment import Chart, Findings, Series, Settings
from bench.eval.models import parameters, target_of
from bench.inflate import inflated_pair
from bench.split import LIMITS, MIXES, MODES, OUTPUT_TOKENS, RATES, Cell, measure, sheet, win_map
from tandem.errors import ConfigError

NAME = "split"
TITLE = "Split against unsplit"
SECONDS = 12.0  # of arrivals in each cell, if there is time
SHARE = 0.6  # of the time that is there: for the load itself; requests end later, and services start
MODES_APART = ("split", "auto")


def run(settings: Settings) -> Findings:
    """Three services on the same cores at the same requests, for each mix of prompts and each rate.

    Raises `ConfigError` for a GPU, which is not shared out to workers as cores are.
    """
    if settings.device != "cpu":
        raise ConfigError(f"split and unsplit share out the CPU's cores, not {settings.device}: --device cpu")
    subject = target_of(settings)
    num_cells = len(MIXES) * len(RATES) * len(MODES)
    seconds = min(SECONDS, SHARE * settings.left_s / num_cells)
    cells = list(measure(seconds, RATES, _models(settings), settings.deadline_s))
    mixes = "; ".join(f"{name}: {lengths}" for name, lengths in MIXES.items())
    setting = (
        f"{subject.name}: {parameters(subject)}; each service on the same 2 cores: split, a prefill and "
        f"a decode worker that share them; unsplit, one worker of two threads; auto, split where that "
        f"costs less. Prompts of 96 or 1,536 tokens ({mixes}), "
        f"{OUTPUT_TOKENS} new tokens, Poisson arrivals for {seconds:.0f} s per cell. TTFT from the scheduled "
        f"arrival. A request is good if TTFT ≤ {LIMITS.ttft_ms:g} ms and the p99 of its gaps ≤ "
        f"{LIMITS.itl_ms:g} ms. A percentile that too few requests support is left out."
    )
    missing = num_cells - len(cells)
    late = [f"Not measured: {missing} of {num_cells} cells: no time left."] if missing else []
    return Findings(
        tables={"rows": cells},
        sheets=[sheet(cells), win_map(cells)],
        charts=list(_charts(subject.name, cells)),
        remarks=[setting, *(verdict(cells, mode) for mode in MODES_APART), *late],
    )


def _models(settings: Settings) -> dict[str, Any]:
    """The part of a configuration that names models; none for the bundled pair as it is."""
    if settings.target is None and settings.shape == "raw":
        return {}
    target, draft = settings.target, settings.draft
    if target is None:
        target, draft = inflated_pair(settings.shape)
    return models_of(target, draft)


def verdict(cells: Sequence[Cell], mode: str) -> str:
    """Where a mode's share of good requests is below that of the unsplit service, and where above."""
    unsplit = {(cell.mix, cell.rate): cell.good or 0.0 for cell in cells if cell.mode == "unsplit"}
    ours = {(cell.mix, cell.rate): cell.good or 0.0 for cell in cells if cell.mode == mode}
    places: dict[str, list[str]] = {"loses": [], "wins": [], "draws": []}
    for (mix, rate), good in ours.items():
        other = unsplit[mix, rate]
        verb = "loses" if good < other else "wins" if good > other else "draws"
        places[verb].append(f"{mix} at {rate:g}/s ({good:.0%} against {other:.0%})")
    said = [f"{verb} with {', '.join(some)}" for verb, some in places.items() if some]
    return f"Good requests: {mode} against unsplit {'; '.join(said) or 'was not measured'}."


def _charts(target: str, cells: Sequence[Cell]) -> Iterator[Chart]:
    """Good requests by rate, a picture per mix."""
    for mix in MIXES:
        series = [
            Series(
                mode,
                [cell.rate for cell in cells if (cell.mix, cell.mode) == (mix, mode)],
                [100 * (cell.good or 0.0) for cell in cells if (cell.mix, cell.mode) == (mix, mode)],
            )
            for mode in MODES
        ]
        title = f"{target}: within the limits, {mix}"
        yield Chart(mix.replace(" ", "-"), title, "requests per second", "good requests, %", series)
