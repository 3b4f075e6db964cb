"""One request from door to end: what was asked, where it stands, and when it got there.

    QUEUED ──► PREFILL ──► TRANSFER ──► DECODE ──► FINISHED_*
      ▲           │            │           │
      └───────────┴────────────┴───────────┘   re-plan: a worker was lost or refused

`Lifecycle.to` is the only way a status changes; it checks the table and stamps the time.
This module knows nothing of sockets, tensors or workers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from enum import Enum, IntEnum

from tandem.errors import AlreadyExists, InvalidRequest
from tandem.pb.v1 import generation_pb2 as pb
from tandem.prefix_usage import NO_HIT, PrefixHit
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams
from tandem.speculation_usage import SpeculationUsage

SEED_BITS = 63
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def check_request_id(request_id: str) -> str:
    """Return the id, or raise `BAD_REQUEST_ID`."""
    if not REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest("BAD_REQUEST_ID", "request_id must match [A-Za-z0-9._-]{1,128}")
    return request_id


def scoped_id(tenant: str, request_id: str) -> str:
    """The name among all tenants' requests; no caller can choose another's, as `/` is not allowed."""
    return f"{tenant}/{request_id}" if tenant else request_id


def child_id(request_id: str, index: int) -> str:
    """The name of one of several completions; no caller can choose it, as `#` is not allowed."""
    return f"{request_id}#{index}"


def seed_of_child(seed: int, index: int) -> int:
    """Completions of one request draw with seeds in a row."""
    return (seed + index) % (1 << SEED_BITS)


def parent_id(request_id: str) -> str:
    """The name that the completions of one request share."""
    return request_id.partition("#")[0]


def public_id(request_id: str) -> str:
    """The name the caller knows."""
    return parent_id(request_id).rpartition("/")[2]


class FinishReason(Enum):
    """Why a completed request ended, in the OpenAI API's words."""

    STOP = "stop"  # end-of-text token, stop string or stop token id
    LENGTH = "length"  # max_tokens or the context limit


class RequestStatus(IntEnum):
    """Where a request is. Everything from FINISHED_STOP on is final."""

    QUEUED = 0
    PREFILL = 1
    TRANSFER = 2
    DECODE = 3
    FINISHED_STOP = 4
    FINISHED_LENGTH = 5
    FINISHED_CANCELLED = 6
    FINISHED_DEADLINE = 7
    FINISHED_REFUSED = 8
    FINISHED_ERROR = 9

    @property
    def is_finished(self) -> bool:
        return self >= RequestStatus.FINISHED_STOP


_FINISHED = frozenset(status for status in RequestStatus if status.is_finished)
TRANSITIONS: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.QUEUED: frozenset({RequestStatus.PREFILL}) | _FINISHED,
    RequestStatus.PREFILL: frozenset({RequestStatus.TRANSFER, RequestStatus.DECODE, RequestStatus.QUEUED})
    | _FINISHED,
    RequestStatus.TRANSFER: frozenset({RequestStatus.DECODE, RequestStatus.QUEUED}) | _FINISHED,
    RequestStatus.DECODE: frozenset({RequestStatus.QUEUED}) | _FINISHED,
    **{status: frozenset() for status in _FINISHED},
}
STATUS_OF_REASON = {
    FinishReason.STOP: RequestStatus.FINISHED_STOP,
    FinishReason.LENGTH: RequestStatus.FINISHED_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in milliseconds. The parts sum to `total_ms`.

    The hand-off parts hold only the time the client waited for them: transfer that ran while
    prefill still computed is inside `prefill_ms`.
    """

    queue_ms: float = 0.0  # received → admitted
    prefill_ms: float = 0.0  # admitted → first token
    kv_write_ms: float = 0.0  # first token → KV sealed in the store
    kv_wait_ms: float = 0.0  # sealed → the decode worker starts to read
    kv_read_ms: float = 0.0  # reading and checking the KV
    first_decode_ms: float = 0.0  # KV in place → second token
    decode_ms: float = 0.0  # second token → last token
    total_ms: float = 0.0
    placement: str = ""  # where the prompt was computed and why: router/disaggregation.py
    transfer_ms: float = 0.0  # spent on sending and fetching KV, whether or not anybody waited for it

    @classmethod
    def from_pb(cls, message: pb.Timings) -> Timings:
        return cls(**{spec.name: getattr(message, spec.name) for spec in fields(cls)})

    def to_pb(self) -> pb.Timings:
        parts = {name: getattr(self, name) for name in _TIMINGS}
        return pb.Timings(**parts, transfer_hidden=self.transfer_hidden)

    def milliseconds(self) -> dict[str, float]:
        """Every duration by its name, to the microsecond."""
        return {name: round(value, 3) for name, value in asdict(self).items() if name.endswith("_ms")}

    @property
    def transfer_hidden(self) -> float:
        """The share of `transfer_ms` that ran while prefill still computed, in [0, 1].

        What the client waited for beyond the transfer itself counts against it.
        """
        waited_ms = self.kv_write_ms + self.kv_wait_ms + self.kv_read_ms
        return max(0.0, 1 - waited_ms / self.transfer_ms) if self.transfer_ms else 0.0


_TIMINGS = tuple(spec.name for spec in fields(Timings))


class Mark(Enum):
    """The instants between two parts of `Timings`, in the order they happen."""

    ADMITTED = "queue_ms"
    FIRST_TOKEN = "prefill_ms"
    KV_SEALED = "kv_write_ms"
    KV_READ_STARTED = "kv_wait_ms"
    KV_READ_DONE = "kv_read_ms"
    SECOND_TOKEN = "first_decode_ms"
    FINISHED = "decode_ms"


class Lifecycle:
    """The status of one request, its transitions and its time line on one monotonic clock.

    A mark closes the part of `Timings` it is named after: the time since the previous mark is
    charged to that part. After a re-plan the same part is charged again, so the sum always holds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.status = RequestStatus.QUEUED
        self.received_s = clock()
        self.stamps: list[tuple[RequestStatus, float]] = [(self.status, self.received_s)]
        self._last_mark_s = self.received_s
        self._parts_s = dict.fromkeys(Mark, 0.0)
        self._transfer_ns = 0
        self.placement = ""

    def to(self, status: RequestStatus) -> None:
        """Move to `status`; a move the table does not list is a bug and raises ValueError."""
        if status not in TRANSITIONS[self.status]:
            raise ValueError(f"illegal transition {self.status.name} → {status.name}")
        self.status = status
        self.stamps.append((status, self._clock()))

    def mark(self, mark: Mark, at_s: float | None = None) -> None:
        """Charge the time since the last mark to `mark`'s part. Time never runs backwards here."""
        now_s = max(self._clock() if at_s is None else at_s, self._last_mark_s)
        self._parts_s[mark] += now_s - self._last_mark_s
        self._last_mark_s = now_s

    def note_transfer(self, spent_ns: int) -> None:
        """So much more time was spent on sending or fetching KV."""
        self._transfer_ns += spent_ns

    def timings(self) -> Timings:
        """The parts so far; `total_ms` is their sum by construction."""
        parts = {mark.value: 1e3 * seconds for mark, seconds in self._parts_s.items()}
        return Timings(
            **parts,
            total_ms=sum(parts.values()),
            transfer_ms=self._transfer_ns / 1e6,
            placement=self.placement,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    prompt: int = 0
    completion: int = 0
    hit: PrefixHit = NO_HIT
    drafted: int = 0
    accepted: int = 0
    speculation: SpeculationUsage | None = None  # of the worker that finished it

    @property
    def cached(self) -> int:
        """Prompt tokens that were not computed again."""
        return self.hit.num_tokens

    def to_pb(self) -> pb.Usage:
        message = pb.Usage(
            prompt=self.prompt,
            completion=self.completion,
            drafted=self.drafted,
            accepted=self.accepted,
            speculation=self.speculation.to_pb() if self.speculation else None,
        )
        self.hit.fill(message)
        return message


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a front hands to the dispatcher: validated, tokenized, named.

    `token_ids` holds the prompt, followed by output tokens already delivered when a request is
    resumed; `num_prompt_tokens` is the border. `seed` is always set, so that a resumed request
    draws the same numbers. `deadline_s` is on the router's monotonic clock.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    max_tokens: int  # resolved against the context length
    seed: int
    deadline_s: float
    is_named: bool = False  # by its caller, who may ask for it again
    priority: int = 0  # higher goes first
    tenant: str = ""
    session: str = ""  # whose requests the session policy keeps together
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    lifecycle: Lifecycle = field(default_factory=Lifecycle, compare=False)

    def __post_init__(self) -> None:
        assert 1 <= self.num_prompt_tokens <= len(self.token_ids), (
            self.num_prompt_tokens,
            len(self.token_ids),
        )

    def asks_as(self, other: Request) -> bool:
        """Whether both ask for the same, whatever each has got already."""
        return self.body == other.body

    @property
    def body(self) -> tuple[object, ...]:
        """What decides about its answer, but for a seed that its caller left open."""
        return self.token_ids[: self.num_prompt_tokens], self.sampling, self.max_tokens, self.speculation

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_total_tokens(self) -> int:
        """Prompt plus the longest allowed output."""
        return self.num_prompt_tokens + self.max_tokens


def name_in_use(running: Request, asked: Request) -> AlreadyExists:
    """Why a request cannot have the name of one that runs."""
    if asked.asks_as(running):
        return AlreadyExists("ID_IN_USE", "request_id is already running")
    return AlreadyExists(
        "ID_REUSED_DIFFERENT_BODY",
        "request_id is already running and asks for something else; give this request a name of its own",
    )
