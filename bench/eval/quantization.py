"""Quantization alone: a target in 16, 8 and 4 bits, without a draft: speed and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.eval import published
from bench.eval.attempt import attempt
from bench.eval.decoding import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    Arm,
    measure,
    num_runs,
    per_round,
    rig_of,
    sampling_params,
)
from bench.eval.experiment import Chart, Findings, Series, Settings
from bench.eval.models import Subject, parameters, target_of
from bench.eval.perplexity import MAX_LENGTH, read, stride_of, window_length
from bench.eval.samples import first_samples
from bench.eval.texts import sources
from bench.eval.utilization import remark as utilization
from bench.measure import Meter, Sheet, Spread
from bench.speculation.rig import Rig, Setup
from bench.speculation.text import Tokens
from tandem.geometry import ModelGeometry

NAME = "quantization"
TITLE = "Quantization alone"
WHOLE = "none"
BITS = {WHOLE: 16, "int8": 8, "nf4": 4, "int4": 4}
TOKENS_PER_SAMPLE = 512  # of text that is read


@dataclass(frozen=True, slots=True)
class Row:
    """A precision of the target, decoding plainly one sample at a time."""

    target: str
    precision: str
    bits: int
    samples: int
    tokens_per_s: float
    ms_per_token: float
    speedup: Spread  # over the unquantized target, within rounds
    utilization: float
    perplexity: float
    agreement: float  # greedy, with the unquantized target


def run(settings: Settings) -> Findings:
    """All precisions that run here."""
    subject = target_of(settings)
    source = next(sources(settings, subject.pair.target))
    samples = first_samples(settings, subject, source)
    text = source.stretch(0, TOKENS_PER_SAMPLE * settings.samples)
    study = Study(subject, samples.prompts, text, settings)
    rows, skipped = study.run()
    length = window_length(ModelGeometry.from_path(subject.pair.target))
    remarks = [
        f"{subject.name}: {parameters(subject)}; {source.name}. {samples.remark}",
        f"Perplexity of {len(text)} tokens in windows of {length} (the usual 2,048, clipped to the model's "
        f"context) with a stride of {stride_of(length)}. Agreement: places with the same likeliest token.",
        utilization(settings.device),
        published.QUANTIZATION_SETTING,
        *skipped,
    ]
    return Findings(
        tables={"rows": rows},
        sheets=[_sheet(rows)],
        charts=_charts(rows),
        remarks=remarks,
        published=published.QUANTIZATION,
    )


class Study:
    """The unquantized target stays loaded, the others come and go."""

    def __init__(self, subject: Subject, prompts: Sequence[Tokens], text: Tokens, settings: Settings) -> None:
        self._subject, self._prompts, self._text, self._settings = subject, prompts, text, settings
        self._whole = self._rig(WHOLE)
        self._reading = read(self._whole.engine.model, text)

    def run(self) -> tuple[list[Row], list[str]]:
        """Rows, and what was not measured and why."""
        with Meter(NAME, len(BITS) * num_runs(2, len(self._prompts), 1, self._settings.rounds)) as meter:
            wanted = {precision: precision for precision in BITS}
            return attempt(wanted, lambda precision: [self._row(precision, meter)], self._settings, meter)

    def _rig(self, precision: str) -> Rig:
        """With room for a round, and for a window of text."""
        each = PROMPT_TOKENS + OUTPUT_TOKENS
        room = max(per_round(len(self._prompts), 1, self._settings.rounds), -(-MAX_LENGTH // each))
        setup = Setup(draft="none", target_precision=precision)
        return rig_of(self._settings, self._subject.pair, setup, room)

    def _row(self, precision: str, meter: Meter) -> Row:
        rig = self._whole if precision == WHOLE else self._rig(precision)
        reading = self._reading if precision == WHOLE else read(rig.engine.model, self._text)
        arms = {WHOLE: Arm.of(self._whole, 0, 0.0), precision: Arm.of(rig, 0, 0.0)}
        found = measure(arms, self._prompts, 1, sampling_params("greedy"), self._settings.rounds, meter.step)
        ours, whole = found[precision].total, found[WHOLE]
        return Row(
            target=self._subject.name,
            precision=precision,
            bits=BITS[precision],
            samples=len(ours.outputs),
            tokens_per_s=ours.tokens_per_s,
            ms_per_token=1e3 / ours.tokens_per_s,
            speedup=Spread.of_ratios(found[precision].rates, whole.rates),
            utilization=found[precision].utilization,
            perplexity=reading.perplexity,
            agreement=reading.agreement(self._reading),
        )


def _sheet(rows: Sequence[Row]) -> Sheet:
    others = {row.bits: row for row in published.QUANTIZATION}
    whole = others[16]
    lines = []
    for row in rows:
        theirs, spread = others[row.bits], row.speedup
        lines.append(
            (
                *(_name(row), f"{row.tokens_per_s:.1f}", f"{row.ms_per_token:.2f}", f"{spread.median:.2f}x"),
                *(f"{spread.low:.2f}…{spread.high:.2f}", f"{row.utilization:.0%}"),
                *(f"{row.perplexity:.3f}", f"{row.agreement:.2%}"),
                f"{theirs.tokens_per_s / whole.tokens_per_s:.2f}x, {theirs.perplexity}",
            )
        )
    columns = (
        *("precision", "tokens/s", "ms/token", "speed-up", "low…high", "utilization", "perplexity"),
        *("agreement", "published: speed, perplexity"),
    )
    return Sheet("a target alone, batch 1", columns, lines, 1)


def _name(row: Row) -> str:
    return f"{row.bits}-bit" if row.precision == WHOLE else f"{row.bits}-bit ({row.precision})"


def _charts(rows: Sequence[Row]) -> list[Chart]:
    """Speed, and how much perplexity grows, over those of 16 bits."""
    others = {row.bits: row for row in published.QUANTIZATION}
    names = [_name(row) for row in rows]
    speeds = [others[row.bits].tokens_per_s / others[16].tokens_per_s for row in rows]
    losses = [others[row.bits].perplexity / others[16].perplexity for row in rows]
    title = rows[0].target if rows else ""
    return [
        _chart("speed", f"{title}: speed over 16 bits", names, [row.speedup.median for row in rows], speeds),
        _chart(
            "perplexity",
            f"{title}: perplexity over that of 16 bits",
            names,
            [row.perplexity / rows[0].perplexity for row in rows],
            losses,
        ),
    ]


def _chart(name: str, title: str, places: list[str], ours: list[float], theirs: list[float]) -> Chart:
    series = [
        Series("Tandem", places, ours),
        Series("Llama-3 8B on an L4, published", places, theirs, is_expected=True),
    ]
    return Chart(name, title, "", "ratio", series, is_bars=True, level=1.0)
