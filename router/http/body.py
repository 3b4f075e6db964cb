"""The JSON object a client sends, within limits, and its members taken out one by one."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from tandem.errors import Cancelled, InvalidRequest
from tandem.rpc import API_MESSAGE_BYTES
from tandem.sampling import bad_param

READ_S = 30.0
DISCARDED_BYTES = 16 << 20


class BadBody(InvalidRequest):
    """A body that cannot be read as a request, with the HTTP status that says so."""

    def __init__(self, message: str, http_status: int = 400) -> None:
        super().__init__("BAD_MESSAGE", message)
        self.http_status = http_status


async def read_object(request: Request) -> dict[str, Any]:
    """The request's body. Raises `BAD_MESSAGE` for anything but one JSON object of at most 1 MiB."""
    _check_headers(request)
    try:
        async with asyncio.timeout(READ_S):
            body = await _read(request)
    except TimeoutError:
        raise BadBody(f"the request body did not arrive within {READ_S:g} s", 408) from None
    except ClientDisconnect:
        raise Cancelled from None
    return _parse(body)


def _check_headers(request: Request) -> None:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":  # which pages of other sites cannot send here unasked
        raise BadBody("content-type must be application/json", 415)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise BadBody("compressed requests are not accepted", 415)
    length = request.headers.get("content-length", "0")
    may_wait = "expect" in request.headers  # the caller sends nothing before we say so
    if length.isdecimal() and int(length) > (API_MESSAGE_BYTES if may_wait else DISCARDED_BYTES):
        _refuse_size()


async def _read(request: Request) -> bytes:
    """The body. One somewhat too large is read to its end, as a caller that still sends hears nothing."""
    body, num_bytes = bytearray(), 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes <= API_MESSAGE_BYTES:
            body += part
        elif num_bytes > DISCARDED_BYTES:
            break
    if num_bytes > API_MESSAGE_BYTES:
        _refuse_size()
    return bytes(body)


def _refuse_size() -> NoReturn:
    raise BadBody(f"the request body is larger than {API_MESSAGE_BYTES} bytes", 413)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    except (ValueError, RecursionError):  # ValueError: no JSON, no UTF-8, NaN, a key twice, 5000 digits
        raise BadBody("the request body is not a valid JSON object") from None
    if not isinstance(parsed, dict):
        raise BadBody("the request body is not a valid JSON object")
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


class Fields:
    """The members of an object by name and type. An explicit null is a member that is absent.

    Each is taken once; `finish` refuses whatever nobody took, so that no parameter is ignored silently.
    Everything raises `BAD_PARAM`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str) -> Any:
        """Whatever it is, or None."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str:
        """Absent is empty."""
        value: str = self._typed(name, (str,), "a string") or ""
        _check_text(name, value)
        return value

    def flag(self, name: str) -> bool:
        """Absent is false."""
        return bool(self._typed(name, (bool,), "true or false"))

    def integer(self, name: str, bits: int = 32) -> int | None:
        """One that fits in so many bits, its sign included."""
        value: int | None = self._typed(name, (int,), "an integer")
        if value is not None and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise bad_param(f"`{name}` must fit in {bits} bits")
        return value

    def number(self, name: str) -> float | None:
        value: float | None = self._typed(name, (int, float), "a number")
        return None if value is None else finite(name, value)

    def object(self, name: str) -> dict[str, Any]:
        """Absent is empty."""
        value: dict[str, Any] | None = self._typed(name, (dict,), "an object")
        return value or {}

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or a list of them; absent is empty."""
        value = self.take(name)
        found = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise bad_param(f"`{name}` must be a string or a list of strings")
        for text in found:
            _check_text(name, text)
        return tuple(found)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers; absent is empty."""
        value = self.take(name)
        found = [] if value is None else value
        if not is_integers(found):
            raise bad_param(f"`{name}` must be a list of integers")
        return tuple(found)

    def finish(self) -> None:
        """Refuse whatever is left."""
        if self._left:
            raise bad_param(f"`{min(self._left)[:64]}` is not a parameter of this endpoint")

    def _typed(self, name: str, kinds: tuple[type, ...], what: str) -> Any:
        value = self.take(name)
        if value is not None and type(value) not in kinds:
            raise bad_param(f"`{name}` must be {what}")
        return value


def is_integers(value: object) -> bool:
    """Whether it is a list of integers, among which JSON's true is none."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def finite(name: str, value: float) -> float:
    """JSON's 1e999 is infinite, and its integers have no limit at all."""
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise bad_param(f"`{name}` must be a finite number")
    return found


def _check_text(name: str, text: str) -> None:
    """JSON can bring half a surrogate pair, which no encoding has bytes for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_param(f"`{name}` must be valid Unicode text") from None
