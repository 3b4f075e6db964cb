"""The error contract: what can go wrong, what the client sees, and whether a retry can help.

    TandemError
    ├── ConfigError            a setting is unusable; raised at start, never over the wire
    ├── InvalidRequest         BAD_MESSAGE, BAD_PARAM, BAD_REQUEST_ID, PROMPT_TOO_LONG, NEVER_FITS
    ├── Unauthenticated        NO_TOKEN, BAD_TOKEN
    ├── NotFound               NO_SUCH_MODEL, NO_SUCH_REQUEST, NO_SUCH_HANDLE, NO_SUCH_FILE, NO_SUCH_BATCH
    ├── AlreadyExists          ID_IN_USE, ID_REUSED_DIFFERENT_BODY
    ├── FailedPrecondition     FINGERPRINT_MISMATCH, STALE_HANDLE, NO_BATCHES, BATCH_ENDED
    ├── Overloaded             QUEUE_FULL, NO_MEMORY_FIT_NOW, TENANT_QUOTA   (carries a retry hint)
    ├── Unavailable            NO_PREFILL, NO_DECODE, STORE_DOWN, DRAINING
    ├── StreamBroken           STREAM_BROKEN
    ├── DeadlineExceeded       DEADLINE_QUEUE, _PREFILL, _TRANSFER, _DECODE
    ├── Cancelled              CLIENT_CANCELLED, ADMIN_ABORT
    ├── DataLoss               KV_CORRUPT
    └── Internal               NUMERICS, BUG

Text in an error is the caller's own numbers and nothing else: no prompt, token, path or address.
This module knows nothing of gRPC objects; `tandem.rpc` puts the table on the wire.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum


class Code(Enum):
    """A gRPC status code by name, with the HTTP status and the OpenAI error type that go with it."""

    INVALID_ARGUMENT = (3, 400, "invalid_request_error")
    UNAUTHENTICATED = (16, 401, "authentication_error")
    PERMISSION_DENIED = (7, 403, "permission_error")
    NOT_FOUND = (5, 404, "not_found_error")
    ALREADY_EXISTS = (6, 409, "conflict_error")
    FAILED_PRECONDITION = (9, 412, "precondition_error")
    RESOURCE_EXHAUSTED = (8, 429, "rate_limit_error")
    UNAVAILABLE = (14, 503, "service_unavailable_error")
    ABORTED = (10, 409, "stream_error")
    DEADLINE_EXCEEDED = (4, 504, "timeout_error")
    CANCELLED = (1, 499, "cancelled_error")
    DATA_LOSS = (15, 500, "server_error")
    INTERNAL = (13, 500, "server_error")

    def __init__(self, grpc_number: int, http_status: int, openai_type: str) -> None:
        self.grpc_number = grpc_number
        self.http_status = http_status
        self.openai_type = openai_type


@dataclass(frozen=True, slots=True)
class Retry:
    """Whether the caller may send the same request again, and how soon."""

    allowed: bool
    after_ms: int | None = None


class TandemError(Exception):
    """Root of every error Tandem raises on purpose.

    `reason` is the stable machine name, `message` the sentence a person reads, `error_id` what an
    operator greps for in the logs, `retry_after_ms` a hint where waiting helps.
    """

    code = Code.INTERNAL
    may_retry = False

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        retry_after_ms: int | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.reason = reason
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.metadata = metadata or {}
        self.error_id = secrets.token_hex(4)
        super().__init__(reason, message)

    def __str__(self) -> str:
        return f"{self.reason}: {self.message} (error_id={self.error_id})"

    @property
    def retry(self) -> Retry:
        return Retry(self.may_retry, self.retry_after_ms)


class ConfigError(TandemError):
    """A setting that cannot work. The message names the setting, the value and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__("BAD_CONFIG", message)

    def __str__(self) -> str:
        return self.message


class InvalidRequest(TandemError):
    """The request can never succeed as it stands."""

    code = Code.INVALID_ARGUMENT


class Unauthenticated(TandemError):
    """The caller has not shown a token that is accepted here."""

    code = Code.UNAUTHENTICATED


class NotFound(TandemError):
    """The same text for what is absent and for what belongs to somebody else."""

    code = Code.NOT_FOUND


class AlreadyExists(TandemError):
    code = Code.ALREADY_EXISTS


class FailedPrecondition(TandemError):
    """Two sides disagree about a build, an epoch or a handle: then the router re-plans, and clients never
    see it. Or what is asked for cannot be done with a batch as it stands."""

    code = Code.FAILED_PRECONDITION


class Overloaded(TandemError):
    """No room now. `retry_after_ms` says when room is expected."""

    code = Code.RESOURCE_EXHAUSTED
    may_retry = True


class Unavailable(TandemError):
    """A part is missing or leaving; nothing was streamed."""

    code = Code.UNAVAILABLE
    may_retry = True

    @classmethod
    def draining(cls) -> Unavailable:
        return cls("DRAINING", "server is shutting down")


class StreamBroken(TandemError):
    """Some tokens were delivered and are valid; the rest cannot be produced."""

    code = Code.ABORTED

    def __init__(self, tokens_delivered: int) -> None:
        super().__init__(
            "STREAM_BROKEN",
            f"generation stopped after {tokens_delivered} tokens because a worker was lost; "
            "tokens already sent are valid",
            metadata={"tokens_delivered": str(tokens_delivered)},
        )


class DeadlineExceeded(TandemError):
    """The deadline passed in the named stage: `queue`, `prefill`, `transfer` or `decode`."""

    code = Code.DEADLINE_EXCEEDED
    may_retry = True
    WHERE = {  # noqa: RUF012 (a constant table)
        "queue": "while queued",
        "prefill": "in prefill",
        "transfer": "moving KV",
        "decode": "decoding",
    }

    def __init__(self, stage: str, tokens_delivered: int = 0) -> None:
        sent = f" ({tokens_delivered} tokens sent)" if stage == "decode" else ""
        super().__init__(
            f"DEADLINE_{stage.upper()}",
            f"deadline passed {self.WHERE[stage]}{sent}",
            metadata={"tokens_delivered": str(tokens_delivered)},
        )


class Cancelled(TandemError):
    code = Code.CANCELLED

    def __init__(self, reason: str = "CLIENT_CANCELLED") -> None:
        by = "client" if reason == "CLIENT_CANCELLED" else "operator"
        super().__init__(reason, f"cancelled by {by}")


class DataLoss(TandemError):
    code = Code.DATA_LOSS
    may_retry = True

    def __init__(self) -> None:
        super().__init__("KV_CORRUPT", "cached state failed its check twice; nothing wrong was sent")


class Internal(TandemError):
    """NUMERICS, or BUG for everything nobody foresaw."""

    @classmethod
    def bug(cls) -> Internal:
        return cls("BUG", "internal error")

    @classmethod
    def numerics(cls) -> Internal:
        return cls("NUMERICS", "model produced a non-finite value; nothing wrong was sent")


_BY_REASON: dict[str, type[TandemError]] = {
    **dict.fromkeys(
        ("BAD_MESSAGE", "BAD_PARAM", "BAD_REQUEST_ID", "PROMPT_TOO_LONG", "NEVER_FITS"), InvalidRequest
    ),
    **dict.fromkeys(("NO_TOKEN", "BAD_TOKEN"), Unauthenticated),
    **dict.fromkeys(
        ("NO_SUCH_MODEL", "NO_SUCH_REQUEST", "NO_SUCH_HANDLE", "NO_SUCH_FILE", "NO_SUCH_BATCH"), NotFound
    ),
    **dict.fromkeys(("ID_IN_USE", "ID_REUSED_DIFFERENT_BODY"), AlreadyExists),
    **dict.fromkeys(
        ("FINGERPRINT_MISMATCH", "STALE_HANDLE", "NO_BATCHES", "BATCH_ENDED"), FailedPrecondition
    ),
    **dict.fromkeys(("QUEUE_FULL", "NO_MEMORY_FIT_NOW", "TENANT_QUOTA", "CLIENT_TOO_SLOW"), Overloaded),
    **dict.fromkeys(("NO_PREFILL", "NO_DECODE", "STORE_DOWN", "DRAINING"), Unavailable),
    **dict.fromkeys(("NUMERICS", "BUG"), Internal),
}
_SPECIAL: dict[str, type[TandemError]] = {
    "STREAM_BROKEN": StreamBroken,
    "CLIENT_CANCELLED": Cancelled,
    "ADMIN_ABORT": Cancelled,
    "KV_CORRUPT": DataLoss,
    **{f"DEADLINE_{stage.upper()}": DeadlineExceeded for stage in DeadlineExceeded.WHERE},
}
REASONS: dict[str, Code] = {reason: kind.code for reason, kind in {**_BY_REASON, **_SPECIAL}.items()}


def failure_of(error: Exception) -> TandemError:
    """What a computation that raised means to its requests: there was no memory for it, or a bug."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return Overloaded(
            "NO_MEMORY_FIT_NOW", "no worker has room now; retry in 1000 ms", retry_after_ms=1000
        )
    return Internal.bug()


def error_from_reason(
    reason: str, message: str, *, retry_after_ms: int | None = None, metadata: dict[str, str] | None = None
) -> TandemError:
    """Rebuild the error that a peer described by its stable reason; an unknown reason becomes `Internal`."""
    kind = _BY_REASON.get(reason) or _SPECIAL.get(reason) or Internal
    error = kind.__new__(kind)
    TandemError.__init__(error, reason, message, retry_after_ms=retry_after_ms, metadata=metadata)
    return error
