"""A file that comes as multipart/form-data, written to disk while it comes: memory stays bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from starlette.requests import ClientDisconnect, Request

from router.batches.files import StoredFile, Upload
from router.http.body import READ_S, BadBody
from tandem.errors import Cancelled
from tandem.sampling import bad_param

WRITTEN_BYTES = 1 << 20  # collected before they are written
MAX_VALUE_BYTES = 1 << 10  # of a field that is no file
MAX_HEADER_BYTES = 2 << 10
MAX_FIELDS = 8
PURPOSES = ("batch",)


@dataclass(slots=True)
class _Part:
    headers: dict[str, bytes] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None

    def read_disposition(self) -> None:
        """What the part's header says of it."""
        message = Message()
        message["content-disposition"] = self.headers.get("content-disposition", b"").decode(
            "utf-8", "replace"
        )
        named = message.get_param("name", header="content-disposition")
        self.name = named if isinstance(named, str) else ""
        self.filename = message.get_filename()


class Form:
    """Takes the bytes of a form: short fields are kept, the one `file` piles up until it is written."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.pending = bytearray()
        self.is_over = False
        self._part = _Part()
        self._value = bytearray()
        self._header = (bytearray(), bytearray())
        named = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end")
        callbacks: dict[str, Callable[..., Any]] = {f"on_{name}": getattr(self, f"_{name}") for name in named}
        callbacks |= {"on_headers_finished": self._headers_finished, "on_end": self._end}
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def feed(self, data: bytes) -> None:
        """Raises `BAD_MESSAGE` or `BAD_PARAM`."""
        try:
            self._parser.write(data)
        except MultipartParseError:
            raise BadBody("the request body is not valid multipart/form-data") from None

    def _part_begin(self) -> None:
        self._part, self._value = _Part(), bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._add_header(0, data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._add_header(1, data[start:end])

    def _add_header(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)
        if len(self._header[which]) > MAX_HEADER_BYTES:
            raise BadBody("a header of the form is too long")

    def _header_end(self) -> None:
        self._part.headers[self._header[0].decode("latin-1").lower()] = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        self._part.read_disposition()
        if self._part.name == "file":
            if self.filename:
                raise bad_param("`file` must be given once")
            self.filename = self._part.filename or "file"

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name == "file":
            self.pending += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > MAX_VALUE_BYTES:
            raise bad_param(f"`{self._part.name[:64]}` is too long")

    def _part_end(self) -> None:
        if self._part.name != "file":
            self.fields[self._part.name] = self._value.decode("utf-8", "replace")
            if len(self.fields) > MAX_FIELDS:
                raise BadBody("the form has too many fields")

    def _end(self) -> None:
        self.is_over = True


async def receive_file(request: Request, upload: Upload) -> StoredFile:
    """The file of a form that OpenAI's clients send. Raises what `Upload` and `Form` do."""
    form = Form(_boundary(request))
    try:
        parts = aiter(request.stream())
        while data := await asyncio.wait_for(anext(parts, b""), READ_S):
            form.feed(data)
            if len(form.pending) >= WRITTEN_BYTES:
                await _write(form, upload)
    except TimeoutError:
        raise BadBody(f"nothing more of the request body arrived within {READ_S:g} s", 408) from None
    except ClientDisconnect:
        raise Cancelled from None
    await _write(form, upload)
    _check(form)
    return await asyncio.to_thread(upload.commit, form.filename)


async def _write(form: Form, upload: Upload) -> None:
    data, form.pending = bytes(form.pending), bytearray()
    await asyncio.to_thread(upload.write, data)


def _check(form: Form) -> None:
    if not form.is_over:
        raise BadBody("the request body is not complete")
    if not form.filename:
        raise bad_param("`file` must be given")
    purpose = form.fields.pop("purpose", "")
    if purpose not in PURPOSES:
        raise bad_param("`purpose` must be batch")
    if form.fields:
        raise bad_param(f"`{min(form.fields)[:64]}` is not a parameter of this endpoint")


def _boundary(request: Request) -> bytes:
    message = Message()
    message["content-type"] = request.headers.get("content-type", "")
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise BadBody("content-type must be multipart/form-data", 415)
    return boundary.encode()
