"""How a request that failed ends: what its client is told, and which status that is."""

from __future__ import annotations

from tandem.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    StreamBroken,
    TandemError,
    Unavailable,
)
from tandem.request import RequestStatus

STAGES = {
    RequestStatus.QUEUED: "queue",
    RequestStatus.PREFILL: "prefill",
    RequestStatus.TRANSFER: "transfer",
    RequestStatus.DECODE: "decode",
}


def as_client_sees(error: TandemError, stage: str, num_delivered: int) -> TandemError:
    """The router knows the stage and the count; and what may be sent again as it was, had no output."""
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded(stage, num_delivered)
    if num_delivered and isinstance(error, (Unavailable, InvalidRequest, FailedPrecondition, NotFound)):
        return StreamBroken(num_delivered)
    if isinstance(error, NotFound) or error.reason == "STALE_HANDLE":
        return Unavailable("STORE_DOWN", "KV store is unavailable", retry_after_ms=1000)
    return error


def status_of(error: TandemError) -> RequestStatus:
    if isinstance(error, DeadlineExceeded):
        return RequestStatus.FINISHED_DEADLINE
    return RequestStatus.FINISHED_REFUSED if isinstance(error, Overloaded) else RequestStatus.FINISHED_ERROR
