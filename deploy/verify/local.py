"""The same model in this process: it says what is typical, and computes again what the service computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tandem.config import ClusterConfig
from tandem.engine.batch import SequenceRows
from tandem.engine.loading import load_engine
from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import SampledToken, Sampler
from tandem.engine.sampling_state import SamplingState
from tandem.errors import ConfigError, Internal
from tandem.geometry import ModelGeometry, num_blocks
from tandem.sampling import SamplingParams

CHUNK = 48  # tokens of a control's chunks: no multiple of what workers use


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, and the tokens that are forced behind it."""

    prompt: tuple[int, ...]
    forced: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.forced)


class Local:
    """A model over a cache of some areas, each for one sequence of at most `num_tokens`. Where decode workers
    hold KV in another dtype than prefill workers, `reader` is the model over a cache of theirs."""

    def __init__(self, config: ClusterConfig, num_areas: int, num_tokens: int) -> None:
        geometry, size = ModelGeometry.from_path(config.model.path), config.cache.block_size
        if num_tokens > geometry.max_context:
            raise ConfigError(f"{num_tokens} tokens are more than the model's {geometry.max_context}")
        self._blocks = num_blocks(num_tokens, size)
        count, held = num_areas * self._blocks, config.kv_dtypes
        self.model = _load(config, count, held.prefill)
        self.reader = self.model if held.are_one else _load(config, count, held.decode)
        self.cache = self.model.cache

    def area(self, number: int) -> range:
        """Its blocks."""
        return range(number * self._blocks, (number + 1) * self._blocks)

    def samples(self, count: int, num_prompt: int, num_forced: int) -> list[Sample]:
        """Sequences that the model itself draws, so that they are typical of it; prompts of mixed length."""
        sampler, states = Sampler(), [self._state(seed) for seed in range(count)]
        drawn = [[seed % self.model.vocab_size] for seed in range(count)]
        for start in range(num_prompt + num_forced - 1):
            rows = [SequenceRows(ids[-1:], start, self.area(i)) for i, ids in enumerate(drawn)]
            tokens = sampler.sample(self.model.forward(self.model.batch(rows)), states)
            for ids, state, token in zip(drawn, states, tokens, strict=True):
                if not isinstance(token, SampledToken):
                    raise Internal.numerics()
                state.append(token.token_id)
                ids.append(token.token_id)
        lengths = [num_prompt - index * (num_prompt // 2) // count for index in range(count)]
        return [
            Sample(tuple(ids[:length]), tuple(ids[length : length + num_forced]))
            for ids, length in zip(drawn, lengths, strict=True)
        ]

    def prefill(self, number: int, prompt: Sequence[int]) -> None:
        """Compute a prompt in one forward."""
        rows = SequenceRows(prompt, 0, self.area(number), num_logits=0)
        self.model.forward(self.model.batch([rows]))

    def prefill_together(self, samples: Sequence[Sample]) -> None:
        """Compute all prompts in one batch and in small chunks, each in the area of its number."""
        for start in range(0, max(len(sample.prompt) for sample in samples), CHUNK):
            chunks = ((i, sample.prompt[start : start + CHUNK]) for i, sample in enumerate(samples))
            rows = [SequenceRows(chunk, start, self.area(i), num_logits=0) for i, chunk in chunks if chunk]
            self.model.forward(self.model.batch(rows))

    def follow(self, number: int, sample: Sample, forced: Sequence[int] | None = None) -> Any:
        """Logits behind each forced token, [tokens, vocab], from the KV of the prompt in an area."""
        return self._follow(self.model, number, sample, sample.forced if forced is None else forced)

    def follow_read(self, number: int, sample: Sample) -> Any:
        """The same from the KV in an area of the reader."""
        return self._follow(self.reader, number, sample, sample.forced)

    def follow_together(self, samples: Sequence[Sample]) -> list[Any]:
        """The same for all samples in one forward, each in the area of its number."""
        rows = [
            SequenceRows(sample.forced, len(sample.prompt), self.area(i), num_logits=len(sample.forced))
            for i, sample in enumerate(samples)
        ]
        logits = self.model.forward(self.model.batch(rows))
        ends = [*accumulate(len(sample.forced) for sample in samples)]
        return [logits[end - len(s.forced) : end] for s, end in zip(samples, ends, strict=True)]

    def _follow(self, model: ModelRunner, number: int, sample: Sample, forced: Sequence[int]) -> Any:
        rows = SequenceRows(forced, len(sample.prompt), self.area(number), num_logits=len(forced))
        return model.forward(model.batch([rows])).clone()

    def _state(self, seed: int) -> SamplingState:
        params = SamplingParams(temperature=1.0, seed=seed, ignore_eos=True)
        return SamplingState(params, seed, (), self.model.vocab_size, device=self.model.device)


def _load(config: ClusterConfig, num_blocks: int, kv_dtype: str) -> ModelRunner:
    budget = num_blocks * ModelGeometry.from_path(config.model.path).block_bytes(
        config.cache.block_size, kv_dtype
    )
    threads = config.prefill.threads
    return load_engine(config, "verify", budget, threads, shares_weights=False, kv_dtype=kv_dtype).model
