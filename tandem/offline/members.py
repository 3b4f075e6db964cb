"""What stands in a record, in the shape of OpenAI's Batch API, with our measurements beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tandem.errors import TandemError
from tandem.offline.lines import BadLine, Entry


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service made of one request: OpenAI's response body, and where its time went."""

    request_id: str
    body: dict[str, Any]
    metrics: dict[str, Any]
    output_tokens: int


def of_answer(entry: Entry, answer: Answer, *, attempts: int) -> dict[str, Any]:
    response = {"status_code": 200, "request_id": answer.request_id, "body": answer.body}
    return _members(entry, response, None, {**answer.metrics, "attempts": attempts})


def of_failure(entry: Entry, error: TandemError, *, attempts: int) -> dict[str, Any]:
    body = {"message": error.message, "type": error.code.openai_type, "param": None, "code": error.reason}
    response = {"status_code": error.code.http_status, "request_id": "", "body": {"error": body}}
    told = {"code": error.reason, "message": error.message}
    return _members(entry, response, told, {"attempts": attempts})


def of_bad_line(line: int, bad: BadLine) -> dict[str, Any]:
    return {
        "id": f"batch_req_line_{line}",
        "custom_id": bad.custom_id,
        "response": None,
        "error": {"code": bad.code, "message": bad.message, "line": line, "column": bad.column},
    }


def of_expired(found: Entry | BadLine, line: int) -> dict[str, Any]:
    """Of a line that was not run before its batch's time was over."""
    if isinstance(found, BadLine):
        return of_bad_line(line, found)
    message = "this request could not be run before the completion window was over"
    return _members(found, None, {"code": "batch_expired", "message": message}, {"attempts": 0})


def _members(
    entry: Entry, response: dict[str, Any] | None, error: dict[str, Any] | None, metrics: dict[str, Any]
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{entry.fingerprint}",
        "custom_id": entry.custom_id,
        "response": response,
        "error": error,
        "fingerprint": entry.fingerprint,
        "metrics": metrics,
    }
