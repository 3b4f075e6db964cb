"""Quantized pairs: target and draft in eight and four bits, against the unquantized target alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.eval import published
from bench.eval.attempt import attempt
from bench.eval.decoding import (
    Arm,
    Row,
    measure,
    num_runs,
    per_round,
    rig_of,
    sampling_params,
)
from bench.eval.experiment import Chart, Findings, Series, Settings
from bench.eval.models import Subject, pair_of
from bench.eval.rows import COLUMNS, REMARK, cells_of, row_of
from bench.eval.samples import first_samples
from bench.eval.texts import sources
from bench.eval.utilization import remark as utilization
from bench.inflate import Pair
from bench.measure import Meter, Sheet
from bench.speculation.rig import Rig, Setup
from bench.speculation.text import Tokens

NAME = "quantized-pairs"
TITLE = "Quantized pairs"
K, TAU = 3, 0.2
PLAIN, SPECULATIVE = (0, 0.0), (K, TAU)
BASELINE = "baseline"
WHOLE = Setup()
SETUPS = {  # in the words of the published table
    "16-bit both": WHOLE,
    "8-bit draft": Setup(draft_precision="int8"),
    "4-bit draft": Setup(draft_precision="nf4"),
    "8-bit target": Setup(target_precision="int8"),
    "8-bit both": Setup(draft_precision="int8", target_precision="int8"),
    "8-bit target, 4-bit draft": Setup(draft_precision="nf4", target_precision="int8"),
}
BITS = (
    "16-bit is the checkpoint as it is; 8-bit is int8 (one scale per output), 4-bit nf4 in groups of 64: the "
    "formats of bitsandbytes."
)


def run(settings: Settings) -> Findings:
    """Every pair beside the unquantized one, in turns with the unquantized target alone."""
    subject = pair_of(settings)
    source = next(sources(settings, subject.pair.target))
    samples = first_samples(settings, subject, source)
    found, remarks = Study(subject, samples.prompts, settings).run()
    setting = [f"{subject.label}; {source.name}. {samples.remark}", f"k = {K}, τ = {TAU}, greedy. {BITS}"]
    return Findings(
        tables={"rows": found},
        sheets=[_sheet(found)],
        charts=[_chart(found)],
        remarks=[*setting, REMARK, utilization(settings.device), published.SPECULATION_SETTING, *remarks],
        published=published.QUANTIZED_PAIRS,
    )


class Study:
    """The unquantized pair stays loaded, the others come and go."""

    def __init__(self, subject: Subject, prompts: Sequence[Tokens], settings: Settings) -> None:
        self._subject, self._prompts, self._settings = subject, prompts, settings
        self._whole = self._rig(subject.pair, WHOLE)

    def run(self) -> tuple[list[Row], list[str]]:
        """Rows, and what was not measured and why."""
        arms = 2 * len(SETUPS) + 1  # and the 8-bit target alone
        with Meter(NAME, num_runs(arms, len(self._prompts), 1, self._settings.rounds)) as meter:
            return attempt(SETUPS, lambda setup: self._rows(setup, meter), self._settings, meter)

    def _rig(self, pair: Pair, setup: Setup) -> Rig:
        room = per_round(len(self._prompts), 1, self._settings.rounds)
        return rig_of(self._settings, pair, setup, room)

    def _rows(self, setup: Setup, meter: Meter) -> Iterator[Row]:
        """Of the pair, and of plain decoding where the target is another than before."""
        rig = self._whole if setup == WHOLE else self._rig(self._subject.pair, setup)
        arms = {BASELINE: Arm.of(self._whole, *PLAIN)}
        cells = [PLAIN, SPECULATIVE] if setup.draft_precision == "none" else [SPECULATIVE]
        arms |= {str(cell): Arm.of(rig, *cell) for cell in cells if (setup, cell) != (WHOLE, PLAIN)}
        found = measure(arms, self._prompts, 1, sampling_params("greedy"), self._settings.rounds, meter.step)
        for cell in cells:
            name, outcome = self._subject.name, found.get(str(cell), found[BASELINE])
            yield row_of(name, setup, cell, "greedy", outcome, found[BASELINE])


def name_of(row: Row) -> str:
    """Of its setup, in the published table's words."""
    if not row.k:
        return {"none": "16-bit target alone", "int8": "8-bit target alone"}[row.target_precision]
    setup = Setup(draft_precision=row.draft_precision, target_precision=row.target_precision)
    return next(name for name, other in SETUPS.items() if other == setup)


def _sheet(rows: Sequence[Row]) -> Sheet:
    lines = [
        (name_of(row), *cells_of(row), *(published.cells(_others(row)) if row.k else ("", "")))
        for row in rows
    ]
    columns = ("pair", *COLUMNS, "published, 1B draft", "3B draft")
    return Sheet(f"quantized pairs, k = {K}, τ = {TAU}, greedy, batch 1", columns, lines, 1)


def _others(row: Row) -> Iterator[published.QuantizedPair]:
    key = (row.draft_precision, row.target_precision)
    return (r for r in published.QUANTIZED_PAIRS if (r.draft_precision, r.target_precision) == key)


def _chart(rows: Sequence[Row]) -> Chart:
    ours = [row for row in rows if row.k]
    theirs = {name_of(row): other.speedup for row in ours for other in _others(row) if other.draft == "1B"}
    series = [
        Series("Tandem", [name_of(row) for row in ours], [row.speedup.median for row in ours]),
        Series("1B / 8B on an L4, published", list(theirs), list(theirs.values()), is_expected=True),
    ]
    title = f"{rows[0].pair if rows else ''}: speed-up over the 16-bit target alone"
    return Chart("speedup", title, "", "speed-up", series, is_bars=True, level=1.0)
