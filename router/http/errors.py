"""Errors in OpenAI's shape: the status, type, reason and retry hints of the error contract."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from router.http.body import BadBody
from tandem.errors import Internal, TandemError

log = logging.getLogger(__name__)

_PARAM = re.compile(r"`([^`]+)`")


def json_bytes(value: Any) -> bytes:
    """Compact JSON. What is no Unicode, which only a caller's own words can be, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class Json(Response):
    """An answer that is one JSON value."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


def error_object(error: TandemError) -> dict[str, Any]:
    """The member `error` of a body; `param` is the parameter that the message names first."""
    named = _PARAM.search(error.message) if error.reason == "BAD_PARAM" else None
    return {
        "error": {
            "message": str(error),
            "type": error.code.openai_type,
            "param": named[1] if named else None,
            "code": error.reason,
        }
    }


def error_response(error: TandemError) -> Json:
    """The whole answer. OpenAI's clients wait as long as told, and retry only where that can help."""
    status = error.http_status if isinstance(error, BadBody) else error.code.http_status
    headers = {"x-should-retry": "true" if error.retry.allowed else "false"}
    if error.retry_after_ms is not None:
        headers["retry-after"] = str(-(-error.retry_after_ms // 1000))
        headers["retry-after-ms"] = str(error.retry_after_ms)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Json(error_object(error), status, headers)


def not_served(error: HTTPException) -> Json:
    """No such path, or not by this method: what the routes themselves refuse."""
    body = {
        "message": f"{error.detail}; the README lists what is served",
        "type": "invalid_request_error",
        "param": None,
        "code": "NO_SUCH_ENDPOINT",
    }
    return Json({"error": body}, error.status_code, error.headers)


def as_tandem_error(error: Exception) -> TandemError:
    """The error itself, or a bug whose text stays in the log."""
    if isinstance(error, TandemError):
        return error
    bug = Internal.bug()
    log.error("unforeseen error %s", bug.error_id, exc_info=error)
    return bug
