"""The whole benchmark in order: acceptance, quality, peers, then the sweep until the time is over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from bench.inflate import BUNDLED, Pair, inflated_pair
from bench.measure import Meter
from bench.openvino import peer as openvino_peer
from bench.profile import record
from bench.speculation import agreement, peers, precision, sweep
from bench.speculation.agreement import Agreement
from bench.speculation.cells import MODEL, TEMPERATURE, Group, designed, everything
from bench.speculation.peers import PeerRow
from bench.speculation.precision import Quality
from bench.speculation.rig import Rig, Setup
from bench.speculation.sweep import Row
from bench.speculation.text import Tokens, held_out, prompts, windows
from tandem.errors import ConfigError
from tandem.sampling import SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 128
MAX_PROMPTS = 32  # of a group
BATCH = 16  # in which steady prompts are looked for
CANDIDATES = 64  # prompts, of which those are used whose greedy continuation does not end in a loop
RAW = "raw"
RIGS_KEPT = 3


def small_draft(large: str) -> str:
    """The name of the grown target with the draft as it was trained."""
    return f"{large}, raw draft"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line may choose."""

    large: str = "111m"  # the cost of the grown pair
    full: bool = False
    rounds: int = 3
    minutes: float = 14.0  # no group of cells is begun later; with `full` there is no limit
    threads: int = 2
    openvino_python: Path | None = None  # an interpreter that has OpenVINO GenAI
    profile: Path | None = None  # where to write what steps spend their time on
    only: tuple[str, ...] = ()  # what has one of these in its name; acceptance and quality have none
    quantization: str = "none"  # of the target where no group has its own

    def of_target(self, setup: Setup) -> Setup:
        has_own = setup.target_precision != "none"
        return setup if has_own else replace(setup, target_precision=self.quantization)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that was wanted and not measured."""

    what: str
    why: str


@dataclass(slots=True)
class Results:
    """Everything that was measured."""

    pairs: dict[str, Pair]
    rows: list[Row] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    looping_share: float = 0.0  # of the prompts tried for the speed runs, which use the others


def _others(pair: str) -> str:
    return f"{pair}: others"


class Benchmark:
    """One run over all pairs; models are loaded when they are needed."""

    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        self._options = options
        large = inflated_pair(options.large)
        self._small_draft = small_draft(options.large)
        self.results = Results(
            {RAW: BUNDLED, options.large: large, self._small_draft: Pair(large.target, BUNDLED.draft)}
        )
        self._rig = lru_cache(RIGS_KEPT)(self._load)
        self._model = options.of_target(MODEL)
        self._data = held_out(BUNDLED.target)

    def run(self) -> Results:
        """Measure everything that can be had here in the time there is."""
        deadline_s = time.monotonic() + 60 * self._options.minutes
        groups, compared = self._groups(), self._compared()
        if not groups and not compared:
            wanted = " or ".join(map(repr, self._options.only))
            raise ConfigError(f"nothing has {wanted} in its name; there are {self._names()}")
        total = sum(sweep.num_runs(group, self._options.rounds) for group in groups)
        with Meter("prompts", total) as meter:
            if not self._options.only:
                self._measure_models(meter)
            asked = self._steady_prompts(max((group.num_prompts for group in groups), default=1))
            for pair in compared:
                self._measure_peers(pair, asked, meter)
            for group in groups:
                if self._options.full or time.monotonic() < deadline_s:
                    self._measure_group(group, asked[: group.num_prompts], meter)
                else:
                    self._skip(group.label, "no time left")
        self._profile(asked[:1])
        return self.results

    def _profile(self, asked: Sequence[Tokens]) -> None:
        """One more prompt of the large pair, drafted for."""
        if self._options.profile is None:
            return
        rig = self._rig(self._options.large, self._model)
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        rig.prefill(asked)
        decoder = rig.constant  # it drafts whatever this machine makes of it today
        label, engine = f"speculation-{self._options.large}", rig.engine.model
        record(self._options.profile, label, engine, partial(rig.run, decoder, asked, 1, sampling))

    def _all_groups(self) -> list[Group]:
        pairs = self._options.large, self._small_draft, RAW
        groups = everything(pairs) if self._options.full else designed(*pairs)
        return [replace(group, setup=self._options.of_target(group.setup)) for group in groups]

    def _groups(self) -> list[Group]:
        return [group for group in self._all_groups() if self._is_wanted(group.label)]

    def _compared(self) -> list[str]:
        """Pairs of which whole requests are compared with others."""
        return [pair for pair in self.results.pairs if self._is_wanted(_others(pair))]

    def _is_wanted(self, name: str) -> bool:
        only = self._options.only
        return not only or any(text in name for text in only)

    def _names(self) -> str:
        return "; ".join([*map(_others, self.results.pairs), *(group.label for group in self._all_groups())])

    def _load(self, pair: str, setup: Setup) -> Rig:
        tokens = PROMPT_TOKENS + OUTPUT_TOKENS
        return Rig(self.results.pairs[pair], setup, MAX_PROMPTS, tokens, self._options.threads)

    def _skip(self, what: str, why: str) -> None:
        self.results.skipped.append(Skipped(what, why))

    def _measure_models(self, meter: Meter) -> None:
        """Acceptance and quality: of the raw pair, as the grown one computes the same."""
        rig = self._rig(RAW, self._model)
        found = agreement.corpora(rig, self._data, TEMPERATURE)
        texts = windows(self._data, agreement.TEXT_WINDOWS, agreement.WINDOW_TOKENS)
        drafts = precision.drafts(BUNDLED, self._skip)
        for corpus in found:
            meter.say(f"acceptance along {corpus.name}")
            self.results.agreement += agreement.agreements(rig.engine.model, drafts, corpus)
        meter.say("quality")
        self.results.quality = precision.measure(BUNDLED.target, texts, self._skip)

    def _steady_prompts(self, count: int) -> list[Tokens]:
        """At least so many prompts whose greedy continuation does not end in a loop."""
        asked = prompts(self._data, CANDIDATES, PROMPT_TOKENS)
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        outputs = self._rig(RAW, self._model).outputs(asked, BATCH, sampling)
        texts = [prompt + output for prompt, output in zip(asked, outputs, strict=True)]
        steady, looping = agreement.by_looping(texts, PROMPT_TOKENS)
        self.results.looping_share = len(looping) / len(texts)
        if len(steady) < count:
            raise ConfigError(f"only {len(steady)} of {CANDIDATES} continuations do not loop")
        return [text[:PROMPT_TOKENS] for text in steady]

    def _measure_peers(self, name: str, asked: list[Tokens], meter: Meter) -> None:
        """Everybody on one pair, in turns."""
        pair, python = self.results.pairs[name], self._options.openvino_python
        meter.say(_others(name))
        everybody = peers.tandem(self._rig(name, self._model), OUTPUT_TOKENS)
        everybody |= peers.transformers(pair, OUTPUT_TOKENS)
        with ExitStack() as stack:
            if python is not None:
                try:
                    pipelines = peers.openvino_pipelines(pair)
                    child = stack.enter_context(
                        openvino_peer.running(python, pipelines, self._options.threads)
                    )
                    everybody |= peers.openvino(child, OUTPUT_TOKENS)
                except ConfigError as error:
                    self._skip(f"{name}: OpenVINO GenAI", str(error))
            self.results.peers += peers.measure(name, everybody, asked[: self._options.rounds])

    def _measure_group(self, group: Group, asked: list[Tokens], meter: Meter) -> None:
        meter.say(group.label)
        try:
            rig = self._rig(group.pair, group.setup)
        except ConfigError as error:
            self._skip(group.label, str(error))
            return
        self.results.rows += sweep.measure(rig, group, asked, OUTPUT_TOKENS, self._options.rounds, meter.step)
