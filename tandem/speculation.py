"""What a caller may ask of speculative decoding, per request. Knows no drafts and no models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from tandem.pb.v1 import generation_pb2 as pb
from tandem.sampling import bad_param

MAX_ASSISTANT_TOKENS = 15  # draft tokens per step: with the token before them they fill a row group


class SpeculationPolicy(Enum):
    """How draft tokens are accepted. Greedy requests give the same tokens under each of them."""

    EXACT = pb.SPECULATION_POLICY_EXACT  # the same seed gives the same text with speculation on or off
    AUTO = pb.SPECULATION_POLICY_AUTO  # same distribution, more accepted tokens, other draws
    OFF = pb.SPECULATION_POLICY_OFF


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationParams:
    """Per-request controls; the server's configuration decides what is left open.

    Raises `InvalidRequest(BAD_PARAM)` for values outside their range.
    """

    policy: SpeculationPolicy = SpeculationPolicy.EXACT
    num_assistant_tokens: int | None = None
    assistant_confidence_threshold: float | None = None  # stop drafting below this probability

    def __post_init__(self) -> None:
        count, threshold = self.num_assistant_tokens, self.assistant_confidence_threshold
        if count is not None and not 1 <= count <= MAX_ASSISTANT_TOKENS:
            raise bad_param(f"`num_assistant_tokens` must be in [1, {MAX_ASSISTANT_TOKENS}]")
        if threshold is not None and not (math.isfinite(threshold) and 0 <= threshold <= 1):
            raise bad_param("`assistant_confidence_threshold` must be a finite number in [0, 1]")

    @property
    def is_off(self) -> bool:
        return self.policy is SpeculationPolicy.OFF

    @classmethod
    def from_pb(cls, message: pb.SpeculationOptions) -> SpeculationParams:
        """Absent fields take the defaults."""
        given = {spec.name: value for spec, value in message.ListFields() if spec.name != "policy"}
        if message.policy == pb.SPECULATION_POLICY_UNSPECIFIED:
            return cls(**given)
        try:
            return cls(policy=SpeculationPolicy(message.policy), **given)
        except ValueError:
            raise bad_param("`speculation.policy` must be one of EXACT, AUTO, OFF") from None

    def to_pb(self) -> pb.SpeculationOptions:
        return pb.SpeculationOptions(
            policy=self.policy.value,
            num_assistant_tokens=self.num_assistant_tokens,
            assistant_confidence_threshold=self.assistant_confidence_threshold,
        )


def parse_speculation(policy: str, num_assistant_tokens: int | None = None) -> SpeculationParams:
    """From the words people type. Raises `BAD_PARAM`."""
    if policy.upper() not in SpeculationPolicy.__members__:
        raise bad_param("`speculation` must be one of exact, auto, off")
    return SpeculationParams(
        policy=SpeculationPolicy[policy.upper()], num_assistant_tokens=num_assistant_tokens
    )
