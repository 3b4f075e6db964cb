"""Samples to decode: those whose greedy continuation does not end in a loop, which any draft predicts."""

from __future__ import annotations

from dataclasses import dataclass

from bench.eval.decoding import AT_ONCE, OUTPUT_TOKENS, PROMPT_TOKENS, rig_of, sampling_params
from bench.eval.experiment import Settings
from bench.eval.models import Subject
from bench.eval.texts import Source
from bench.inflate import Pair
from bench.speculation.agreement import by_looping
from bench.speculation.rig import Setup
from bench.speculation.text import Tokens, batches
from tandem.errors import ConfigError

CANDIDATES = 3  # for each sample that is wanted
RULE = (
    f"Samples are texts of at least {PROMPT_TOKENS} tokens, clipped to {PROMPT_TOKENS}, and get "
    f"{OUTPUT_TOKENS} new tokens; those whose greedy continuation ends in a loop are left out. Decoding "
    "alone is timed."
)


@dataclass(frozen=True, slots=True)
class Samples:
    """Prompts, and what share of all that were tried loops."""

    prompts: list[Tokens]
    looping_share: float

    @property
    def count(self) -> str:
        """How many, and how many were not taken."""
        return f"{len(self.prompts)} samples ({self.looping_share:.0%} of those tried loop and are left out)"

    @property
    def remark(self) -> str:
        """The same, and what samples are."""
        return f"{self.count}. {RULE}"


class Writer:
    """The target alone, as cheap as it comes."""

    def __init__(self, settings: Settings, subject: Subject) -> None:
        pair = Pair(subject.writer, subject.writer)
        self._rig = rig_of(settings, pair, Setup(draft="none"), AT_ONCE)

    def samples(self, source: Source, count: int) -> Samples:
        """Up to `count`. Raises `ConfigError` if every continuation loops, or no text is long enough."""
        steady: list[Tokens] = []
        tried = 0
        for some in batches(source.samples(CANDIDATES * count, PROMPT_TOKENS), AT_ONCE):
            outputs = self._rig.outputs(some, AT_ONCE, sampling_params("greedy"))
            texts = [prompt + output for prompt, output in zip(some, outputs, strict=True)]
            found, _ = by_looping(texts, PROMPT_TOKENS)
            steady += [text[:PROMPT_TOKENS] for text in found]
            tried += len(some)
        if not steady:
            raise ConfigError(f"all {tried} continuations of {source.name} end in a loop; give other texts")
        chosen = [steady[index * len(steady) // count] for index in range(count)]
        prompts = steady if len(steady) <= count else chosen
        return Samples(prompts, 1 - len(steady) / tried)


def first_samples(settings: Settings, subject: Subject, source: Source) -> Samples:
    """As the settings ask, of one source."""
    return Writer(settings, subject).samples(source, settings.samples)
