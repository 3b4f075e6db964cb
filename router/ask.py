"""What a caller asks for, before it is tokenized and named. Every front makes one of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf import duration_pb2

from tandem.pb.v1 import generation_pb2 as pb
from tandem.sampling import SamplingParams, bad_param
from tandem.speculation import SpeculationParams

SESSION_HEADER = "x-session-id"  # of HTTP, and gRPC's metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One prompt, as text or as token ids, and how to complete it."""

    prompt: str | Sequence[int]
    add_special_tokens: bool = True  # to a text; False where a template has written them
    delivered: Sequence[int] = ()  # output tokens the caller has already, of a stream that was lost
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    model: str = ""  # empty: the one served
    request_id: str = ""  # empty: one is made up
    priority: int = 0  # higher goes first
    timeout_s: float | None = None
    tenant: str = ""  # by the caller's token
    session: str = ""  # whose requests the session policy keeps together

    @classmethod
    def from_pb(cls, message: pb.GenerationInput, *, tenant: str = "", session: str = "") -> Ask:
        """Absent fields take the defaults. Raises `BAD_PARAM`."""
        return cls(
            prompt=_prompt(message),
            delivered=tuple(message.delivered_token_ids),
            sampling=SamplingParams.from_pb(message.sampling),
            speculation=SpeculationParams.from_pb(message.speculation),
            model=message.model,
            request_id=message.request_id,
            priority=message.priority,
            timeout_s=_seconds(message.timeout) if message.HasField("timeout") else None,
            tenant=tenant,
            session=session,
        )


def _prompt(message: pb.GenerationInput) -> str | Sequence[int]:
    match message.WhichOneof("input"):
        case "text":
            return message.text
        case "token_ids":
            return message.token_ids.ids
    raise bad_param("one of `text` and `token_ids` must be given")


def _seconds(duration: duration_pb2.Duration) -> float:
    """A protobuf duration as a number, or `BAD_PARAM` if its fields are outside their ranges."""
    try:
        duration.ToJsonString()  # the one public function that checks them
    except ValueError:
        raise bad_param("`timeout` must be a duration of at most 10000 years") from None
    return float(duration.seconds + duration.nanos / 1e9)
