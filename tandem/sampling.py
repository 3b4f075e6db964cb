"""What a caller may ask of the sampler, and which values make sense. Holds no tensors and no state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from tandem.errors import InvalidRequest
from tandem.pb.v1 import generation_pb2 as pb

MAX_N = 8
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 128
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024


def bad_param(message: str) -> InvalidRequest:
    """The error for one parameter out of range; the message names the parameter and its range."""
    return InvalidRequest("BAD_PARAM", message)


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = math.isfinite(value) and low <= value <= high and not (open_low and value == low)
    if not inside:
        bracket = "(" if open_low else "["
        raise bad_param(f"`{name}` must be a finite number in {bracket}{low:g}, {high:g}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How output tokens are chosen. The defaults are greedy decoding until the end-of-text token.

    Filters apply in the order: logit bias and penalties, temperature, top-k, top-p, min-p. The
    repetition penalty counts prompt and output tokens (CTRL, Keskar et al. 2019); presence and
    frequency penalties count output tokens only, as in the OpenAI API. `logprobs` are of the
    model's own distribution, before any of these.

    Raises `InvalidRequest(BAD_PARAM)` for any value outside its documented range.
    """

    max_tokens: int | None = None  # None: up to the context length
    min_tokens: int = 0
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None  # number of alternatives per position; 0: only the chosen token's
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0, 2)
        _check_range("top_p", self.top_p, 0, 1, open_low=True)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0, 10, open_low=True)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        self._check_counts()
        self._check_stops()
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise bad_param(f"`logit_bias` may name at most {MAX_LOGIT_BIAS} tokens")
        for bias in self.logit_bias.values():
            _check_range("logit_bias", bias, -100, 100)

    def _check_counts(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise bad_param("`max_tokens` must be at least 1")
        if self.min_tokens < 0 or self.min_tokens > (self.max_tokens or self.min_tokens):
            raise bad_param("`min_tokens` must be between 0 and max_tokens")
        if self.top_k < 0:
            raise bad_param("`top_k` must be 0 (keep all) or more")
        if not 1 <= self.n <= MAX_N:
            raise bad_param(f"`n` must be in [1, {MAX_N}]")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise bad_param(f"`logprobs` must be in [0, {MAX_LOGPROBS}]")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise bad_param("`seed` must fit in 64 bits")

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise bad_param(f"`stop` may hold at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not text or len(text.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES:
                raise bad_param(f"each `stop` string must have 1 to {MAX_STOP_BYTES} bytes")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise bad_param(f"`stop_token_ids` may hold at most {MAX_STOP_TOKEN_IDS} ids")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `BAD_PARAM` if a token id named here does not exist in the model's vocabulary."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", tuple(self.logit_bias))):
            if any(not 0 <= token < vocab_size for token in ids):
                raise bad_param(f"`{name}` holds a token id outside [0, {vocab_size})")

    @classmethod
    def from_pb(cls, message: pb.SamplingParams) -> SamplingParams:
        """Absent fields take the defaults. Raises `InvalidRequest(BAD_PARAM)`."""
        given: dict[str, Any] = {
            spec.name: value for spec, value in message.ListFields() if spec.name in _DEFAULTS
        }
        return cls(
            **given,
            logit_bias=dict(message.logit_bias),
            stop=tuple(message.stop),
            stop_token_ids=tuple(message.stop_token_ids),
        )

    def to_pb(self) -> pb.SamplingParams:
        """With what is not the default only: most requests say little."""
        given: dict[str, Any] = {
            name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default
        }
        return pb.SamplingParams(
            **given, logit_bias=self.logit_bias, stop=self.stop, stop_token_ids=self.stop_token_ids
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether any penalty or bias acts, so that argmax alone is not the answer."""
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
        )


_DEFAULTS = {
    spec.name: spec.default
    for spec in fields(SamplingParams)
    if spec.name not in ("logit_bias", "stop", "stop_token_ids")
}
