"""QSpec tables: four-bit weights whose drafts compute with activations of fewer bits (Zhao et al.).

W4A16 verifies (activations are 16-bit integers), W4A4 or W4A8 drafts by the same weights over the same KV.
No processor here multiplies four bits: W4A4 is emulated, so its speed says nothing about hardware that does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.eval import published
from bench.eval.attempt import attempt
from bench.eval.decoding import (
    Arm,
    Outcome,
    measure,
    num_runs,
    rig_of,
    sampling_params,
)
from bench.eval.experiment import Findings, Settings
from bench.eval.models import Subject, parameters, target_of
from bench.eval.perplexity import MAX_LENGTH, read
from bench.eval.qspec_tables import BASELINE, Acceptance, Fidelity, Throughput, charts, sheets
from bench.eval.samples import first_samples
from bench.eval.texts import sources
from bench.eval.utilization import remark as utilization
from bench.measure import Meter, Spread
from bench.speculation.rig import BLOCK_SIZE, Rig, Setup
from bench.speculation.text import Tokens
from decode_worker.decoder import PlainDecoder
from tandem.engine.model_runner import ModelRunner
from tandem.geometry import num_blocks

NAME = "qspec"
TITLE = "QSpec: one set of four-bit weights drafts and verifies"
WEIGHTS = "int4"
BATCHES, GAMMAS = (8, 16, 32), range(2, 8)
GAMMA, ACCEPTANCE_BATCH = 3, 8
WIDTHS = {4: "W4A4", 8: "W4A8"}
MOST_ROUNDS = 3
EMULATED = frozenset({4})  # bits that nothing here multiplies
TOKENS_PER_SAMPLE = 512  # of text that is read
SETTING = (
    f"{WEIGHTS}: 4-bit weights in groups of 128; activations of W4A16 are 16-bit integers, those of W4A4 are "
    f"rounded to four bits and multiplied as wider ones (emulated). γ = {GAMMA} where it is not said, "
    "greedy. W4A4 and W4A8 alone decode after prompts that W4A16 prefilled."
)


def run(settings: Settings) -> Findings:
    """Throughput by batch, acceptance by γ, fidelity."""
    subject = target_of(settings)
    source = next(sources(settings, subject.pair.target))
    samples = first_samples(settings, subject, source)
    text = source.stretch(0, TOKENS_PER_SAMPLE * settings.samples)
    study = Study(subject, samples.prompts, settings)
    with Meter(NAME, study.num_runs) as meter:
        fidelity, skipped = attempt({"fidelity": text}, study.fidelity, settings, meter)
        by_gamma, later = attempt(
            {"acceptance": GAMMAS}, lambda gammas: study.acceptance(gammas, meter), settings, meter
        )
        parts = {f"batch {batch}": batch for batch in BATCHES}
        rows, late = attempt(parts, lambda batch: study.throughput(batch, meter), settings, meter)
    remarks = [
        f"{subject.name}: {parameters(subject)}; {source.name}: {samples.remark} A batch larger than that "
        f"repeats samples. Perplexity of {len(text)} tokens as in `tandem eval quantization`.",
        *(SETTING, utilization(settings.device), published.QSPEC_SETTING, *skipped, *late, *later),
    ]
    return Findings(
        tables={"rows": rows, "acceptance": by_gamma, "fidelity": fidelity},
        sheets=sheets(rows, by_gamma, fidelity),
        charts=charts(subject.name, rows, by_gamma),
        remarks=remarks,
        published=published.QSPEC,
    )


class Study:
    """A rig per width of the drafts' activations."""

    def __init__(self, subject: Subject, prompts: Sequence[Tokens], settings: Settings) -> None:
        self._subject, self._prompts, self._settings = subject, prompts, settings
        self._rounds = min(settings.rounds, MOST_ROUNDS)  # each is a whole batch
        setups = {bits: Setup("qspec", target_precision=WEIGHTS, activation_bits=bits) for bits in WIDTHS}
        self._rigs = {
            bits: rig_of(settings, subject.pair, setup, max(BATCHES)) for bits, setup in setups.items()
        }

    @property
    def num_runs(self) -> int:
        """Steps of the meter."""
        rounds, methods = self._rounds, 1 + 2 * len(WIDTHS)
        by_batch = sum(num_runs(methods, rounds * batch, batch, rounds) for batch in BATCHES)
        return by_batch + num_runs(len(WIDTHS) * len(GAMMAS), ACCEPTANCE_BATCH, ACCEPTANCE_BATCH, 1)

    def fidelity(self, text: Tokens) -> Iterator[Fidelity]:
        """What W4A16 and what drafts think of a text. QSpec's tokens are those of W4A16."""
        blocks = num_blocks(MAX_LENGTH, BLOCK_SIZE)
        whole = ModelRunner.load(
            self._subject.pair.target,
            num_blocks=blocks,
            block_size=BLOCK_SIZE,
            device=self._settings.device,
        )
        models = {"16-bit": whole, BASELINE: self._any.engine.model}
        models |= {_alone(bits): self._drafting(bits) for bits in WIDTHS}
        readings = {name: read(model, text) for name, model in models.items()}
        for name, reading in readings.items():
            agreements = (reading.agreement(readings[other]) for other in (BASELINE, "16-bit"))
            yield Fidelity(self._subject.name, name, reading.perplexity, *agreements)

    def throughput(self, batch: int, meter: Meter) -> Iterator[Throughput]:
        """Every method, in turns."""
        prompts = [self._prompts[index % len(self._prompts)] for index in range(batch)]
        arms, rounds = self._arms(), self._rounds
        found = measure(arms, prompts * rounds, batch, sampling_params("greedy"), rounds, meter.step)
        for method, outcome in found.items():
            yield self._row(method, batch, outcome, found[BASELINE])

    def acceptance(self, gammas: Sequence[int], meter: Meter) -> Iterator[Acceptance]:
        """By width and γ, once."""
        prompts = [self._prompts[index % len(self._prompts)] for index in range(ACCEPTANCE_BATCH)]
        arms = {(bits, gamma): Arm.of(self._rigs[bits], gamma, 0.0) for bits in WIDTHS for gamma in gammas}
        found = measure(arms, prompts, ACCEPTANCE_BATCH, sampling_params("greedy"), 1, meter.step)
        for (bits, gamma), outcome in found.items():
            whole = outcome.total
            yield Acceptance(
                target=self._subject.name,
                draft=_labelled(WIDTHS[bits], bits),
                gamma=gamma,
                acceptance_rate=whole.acceptance_rate,
                alpha=whole.alpha,
                tokens_per_step=1 + whole.mean_accepted_length,
                draft_share=whole.draft_s / whole.seconds,
                verify_share=whole.verify_s / whole.seconds,
            )

    @property
    def _any(self) -> Rig:
        return next(iter(self._rigs.values()))

    def _drafting(self, bits: int) -> ModelRunner:
        model = self._rigs[bits].engine.draft
        assert model is not None, "a QSpec rig has a draft"
        return model

    def _arms(self) -> dict[str, Arm]:
        arms = {BASELINE: Arm.of(self._any, 0, 0.0)}
        for bits, name in WIDTHS.items():
            arms[_labelled(f"QSpec, {name} drafts", bits)] = Arm.of(self._rigs[bits], GAMMA, 0.0)
        for bits in WIDTHS:
            arms[_alone(bits)] = Arm(self._rigs[bits], PlainDecoder(self._drafting(bits)))
        return arms

    def _row(self, method: str, batch: int, outcome: Outcome, baseline: Outcome) -> Throughput:
        whole = outcome.total
        is_qspec = method.startswith("QSpec")
        return Throughput(
            target=self._subject.name,
            method=method,
            batch=batch,
            tokens_per_s=whole.tokens_per_s,
            speedup=Spread.of_ratios(outcome.rates, baseline.rates),
            acceptance_rate=whole.acceptance_rate if is_qspec else None,
            draft_share=whole.draft_s / whole.seconds if is_qspec else None,
            verify_share=whole.verify_s / whole.seconds if is_qspec else None,
            utilization=outcome.utilization,
            identical=whole.outputs == baseline.total.outputs,
        )


def _labelled(name: str, bits: int) -> str:
    return f"{name} (emulated)" if bits in EMULATED else name


def _alone(bits: int) -> str:
    return _labelled(f"{WIDTHS[bits]} alone", bits)
