"""The error contract: every reason has a code, a retry rule and a way back from the wire."""

from __future__ import annotations

import re

import pytest

from tandem import errors
from tandem.errors import (
    REASONS,
    Cancelled,
    Code,
    ConfigError,
    DataLoss,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    StreamBroken,
    TandemError,
    Unavailable,
    error_from_reason,
)

# The fixed part of the contract, spelled out once more so that an edit of the table is noticed.
CONTRACT = {
    "INVALID_ARGUMENT": (3, 400, "BAD_MESSAGE BAD_PARAM BAD_REQUEST_ID PROMPT_TOO_LONG NEVER_FITS"),
    "UNAUTHENTICATED": (16, 401, "NO_TOKEN BAD_TOKEN"),
    "NOT_FOUND": (5, 404, "NO_SUCH_MODEL NO_SUCH_REQUEST NO_SUCH_HANDLE NO_SUCH_FILE NO_SUCH_BATCH"),
    "ALREADY_EXISTS": (6, 409, "ID_IN_USE ID_REUSED_DIFFERENT_BODY"),
    "FAILED_PRECONDITION": (9, 412, "FINGERPRINT_MISMATCH STALE_HANDLE NO_BATCHES BATCH_ENDED"),
    "RESOURCE_EXHAUSTED": (8, 429, "QUEUE_FULL NO_MEMORY_FIT_NOW TENANT_QUOTA"),
    "UNAVAILABLE": (14, 503, "NO_PREFILL NO_DECODE STORE_DOWN DRAINING"),
    "ABORTED": (10, 409, "STREAM_BROKEN"),
    "DEADLINE_EXCEEDED": (4, 504, "DEADLINE_QUEUE DEADLINE_PREFILL DEADLINE_TRANSFER DEADLINE_DECODE"),
    "CANCELLED": (1, 499, "CLIENT_CANCELLED ADMIN_ABORT"),
    "DATA_LOSS": (15, 500, "KV_CORRUPT"),
    "INTERNAL": (13, 500, "NUMERICS BUG"),
}
ROWS = [
    (reason, code, grpc_number, http_status)
    for code, (grpc_number, http_status, reasons) in CONTRACT.items()
    for reason in reasons.split()
]


@pytest.mark.parametrize(("reason", "code", "grpc_number", "http_status"), ROWS)
def test_each_reason_has_its_status(reason, code, grpc_number, http_status):
    assert REASONS[reason] is Code[code]
    assert (REASONS[reason].grpc_number, REASONS[reason].http_status) == (grpc_number, http_status)


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_a_peers_description_becomes_the_same_kind_of_error(reason):
    error = error_from_reason(reason, "a sentence", retry_after_ms=7, metadata={"k": "v"})
    assert error.code is REASONS[reason]
    assert (error.reason, error.message, error.metadata) == (reason, "a sentence", {"k": "v"})
    assert error.retry.after_ms == 7


def test_an_unknown_reason_is_internal_and_not_retried():
    error = error_from_reason("FROM_THE_FUTURE", "?")
    assert type(error) is Internal
    assert not error.retry.allowed


def test_every_class_in_the_tree_is_reachable_from_the_module_text():
    kinds = {k.__name__ for k in vars(errors).values() if isinstance(k, type) and issubclass(k, TandemError)}
    assert errors.__doc__ is not None
    assert kinds <= set(re.findall(r"\w+", errors.__doc__))


@pytest.mark.parametrize("kind", [Overloaded, Unavailable, DataLoss, DeadlineExceeded])
def test_retrying_helps_when_the_cause_may_pass(kind):
    assert kind.may_retry


@pytest.mark.parametrize("kind", [InvalidRequest, StreamBroken, Cancelled, Internal])
def test_retrying_does_not_help_otherwise(kind):
    assert not kind.may_retry


def test_an_error_reads_as_reason_sentence_and_id():
    error = Overloaded("QUEUE_FULL", "server is full; retry in 800 ms", retry_after_ms=800)
    assert re.fullmatch(r"QUEUE_FULL: server is full; retry in 800 ms \(error_id=[0-9a-f]{8}\)", str(error))
    assert error.error_id != Overloaded("QUEUE_FULL", "").error_id


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (
            StreamBroken(37),
            "STREAM_BROKEN",
            "generation stopped after 37 tokens because a worker was lost; tokens already sent are valid",
        ),
        (DeadlineExceeded("queue"), "DEADLINE_QUEUE", "deadline passed while queued"),
        (DeadlineExceeded("prefill"), "DEADLINE_PREFILL", "deadline passed in prefill"),
        (DeadlineExceeded("transfer"), "DEADLINE_TRANSFER", "deadline passed moving KV"),
        (DeadlineExceeded("decode", 37), "DEADLINE_DECODE", "deadline passed decoding (37 tokens sent)"),
        (Cancelled(), "CLIENT_CANCELLED", "cancelled by client"),
        (Cancelled("ADMIN_ABORT"), "ADMIN_ABORT", "cancelled by operator"),
        (DataLoss(), "KV_CORRUPT", "cached state failed its check twice; nothing wrong was sent"),
        (Internal.bug(), "BUG", "internal error"),
        (
            Internal.numerics(),
            "NUMERICS",
            "model produced a non-finite value; nothing wrong was sent",
        ),
    ],
)
def test_canonical_messages(error, reason, message):
    assert (error.reason, error.message) == (reason, message)
    assert REASONS[reason] is error.code


def test_tokens_already_delivered_travel_as_metadata():
    assert StreamBroken(37).metadata == {"tokens_delivered": "37"}
    assert DeadlineExceeded("decode", 5).metadata == {"tokens_delivered": "5"}


def test_a_config_error_is_just_its_sentence():
    assert str(ConfigError("block size must divide 64, not 5")) == "block size must divide 64, not 5"
