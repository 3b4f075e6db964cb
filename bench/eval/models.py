"""Which models an experiment is about: the bundled pair, as it is or grown, or the caller's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.eval.experiment import Settings
from bench.inflate import BUNDLED, Pair, describe, inflated_pair
from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry


@dataclass(frozen=True, slots=True)
class Subject:
    """A pair and what to call it; `writer` computes the same as its target, at the least cost there is."""

    name: str
    pair: Pair
    writer: Path

    @property
    def label(self) -> str:
        """With the parameters of both."""
        return f"{self.name}: {describe(self.pair)}"


def pair_of(settings: Settings) -> Subject:
    """Raises `ConfigError` if half of a pair is missing, or for an unknown shape."""
    if settings.target is None:
        if settings.draft is not None:
            raise ConfigError("--draft alone is no pair; name its --target too")
        pair = BUNDLED if settings.shape == "raw" else inflated_pair(settings.shape)
        return Subject(settings.shape, pair, BUNDLED.target)
    if settings.draft is None:
        raise ConfigError("this experiment is about a pair: name a --draft beside --target")
    return Subject(settings.target.name, Pair(settings.target, settings.draft), settings.target)


def target_of(settings: Settings) -> Subject:
    """Where no draft model is needed: the target stands for both. Raises as `pair_of`."""
    if settings.target is None:
        found = pair_of(settings)
        return Subject(found.name, Pair(found.pair.target, found.pair.target), found.writer)
    return Subject(settings.target.name, Pair(settings.target, settings.target), settings.target)


def parameters(subject: Subject) -> str:
    """Of the target."""
    return f"{ModelGeometry.from_path(subject.pair.target).num_parameters / 1e6:.1f}M parameters"
