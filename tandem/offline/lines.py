"""An input file line by line, in bounded memory, and what each line asks for.

A line is one of
  * OpenAI's Batch format: `{"custom_id", "method": "POST", "url": "/v1/…", "body": {…}}`;
  * a body alone: `{"prompt": …}`, `{"token_ids": […]}` or `{"messages": […]}`, with `custom_id` if one likes;
  * a prompt as plain text.
Lines end with a newline byte and nothing else: other characters that Unicode calls line ends are text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from tandem.errors import ConfigError

MAX_LINE_BYTES = 4 << 20
SNIFFED_LINES = 20
COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
URLS = (COMPLETIONS, CHAT_COMPLETIONS)
BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line that is not blank. `data` is None if it is too long to be held."""

    number: int  # from 1
    data: bytes | None


class BadLine(ValueError):
    """What is wrong with one line, and where: it becomes an error record."""

    def __init__(self, code: str, message: str, custom_id: str, column: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id
        self.column = column  # in characters, from 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One request. `fingerprint` names what is asked of which model: the same name, the same work."""

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]
    fingerprint: str  # 32 hexadecimal digits


Check = Callable[[Entry], None]  # raises BadLine for what the service would refuse anyway


@dataclass(frozen=True, slots=True)
class LineParser:
    """Lines to entries. `defaults` complete bodies that stand alone, not those of the Batch format."""

    is_text: bool
    defaults: Mapping[str, Any]
    model_fingerprint: str = ""

    def parse(self, line: Line) -> Entry:
        """Raises `BadLine`."""
        name = f"line-{line.number}"
        if line.data is None:
            raise BadLine("BAD_LINE", f"the line is longer than {MAX_LINE_BYTES} bytes", name)
        text = _decode(line.data, name)
        values = {"prompt": text} if self.is_text else _object(text, name)
        custom_id = values.pop("custom_id", None)
        if custom_id is None and not {"url", "method", "body"} & set(values):
            custom_id = name  # a body that stands alone
        if not isinstance(custom_id, str) or not custom_id:
            raise BadLine("BAD_LINE", "`custom_id` must be a string that is not empty", name)
        url, body = self._request(values, custom_id)
        named = json.dumps([custom_id, url, body, self.model_fingerprint], sort_keys=True)
        digest = hashlib.sha256(named.encode()).hexdigest()
        return Entry(line.number, custom_id, url, body, digest[:32])

    def _request(self, values: dict[str, Any], custom_id: str) -> tuple[str, dict[str, Any]]:
        if "body" in values or "url" in values:
            return _batch_request(values, custom_id)
        if "token_ids" in values and "prompt" not in values:
            values["prompt"] = values.pop("token_ids")
        if ("prompt" in values) == ("messages" in values):
            raise BadLine("BAD_LINE", "needs one of `prompt`, `token_ids`, `messages` and `body`", custom_id)
        url = COMPLETIONS if "prompt" in values else CHAT_COMPLETIONS
        return url, {**self.defaults, **values}


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """All lines that are not blank, with their numbers, whatever their length."""
    for number in itertools.count(1):
        data = file.readline(MAX_LINE_BYTES + 1)
        if not data:
            return
        if len(data) > MAX_LINE_BYTES:
            while data and not data.endswith(b"\n"):
                data = file.readline(MAX_LINE_BYTES)
            yield Line(number, None)
            continue
        data = (data.removeprefix(BOM) if number == 1 else data).rstrip(b"\r\n")
        if data.strip():
            yield Line(number, data)


def read_entries(
    path: Path,
    parser: LineParser,
    check: Check = lambda entry: None,
    finished: Container[int] = frozenset(),
) -> Iterator[tuple[int, Entry | BadLine]]:
    """Every line but the finished ones: its number, and what it asks for or what is wrong with it."""
    with path.open("rb") as file:
        for line in read_lines(file):
            if line.number in finished:
                continue
            try:
                entry = parser.parse(line)
                check(entry)
                yield line.number, entry
            except BadLine as error:
                yield line.number, error


def is_plain_text(path: Path) -> bool:
    """Whether lines are prompts, not JSON. Raises `ConfigError` for a file that is unreadable or UTF-16."""
    try:
        with path.open("rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise ConfigError(f"{path} is UTF-16; convert it to UTF-8")
            file.seek(0)
            first = itertools.islice(read_lines(file), SNIFFED_LINES)
            return not any(line.data is None or line.data.lstrip().startswith(b"{") for line in first)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        column = len(data[: error.start].decode()) + 1
        raise BadLine("BAD_LINE", f"not UTF-8 at column {column}", name, column) from None


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        values = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair has no bytes
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg} at column {error.colno}"
        raise BadLine("BAD_LINE", message, name, error.colno) from None
    except UnicodeEncodeError:
        raise BadLine("BAD_LINE", "holds half of a surrogate pair, which is no text", name) from None
    except (ValueError, RecursionError) as error:
        raise BadLine("BAD_LINE", f"not valid JSON: {str(error)[:100]}", name) from None
    if not isinstance(values, dict):
        raise BadLine("BAD_LINE", "not a JSON object", name)
    return values


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _batch_request(values: dict[str, Any], custom_id: str) -> tuple[str, dict[str, Any]]:
    url, body = values.get("url"), values.get("body")
    if values.get("method", "POST") != "POST":
        raise BadLine("BAD_LINE", "`method` must be POST", custom_id)
    if url not in URLS:
        raise BadLine("BAD_LINE", f"`url` must be one of {', '.join(URLS)}", custom_id)
    if not isinstance(body, dict):
        raise BadLine("BAD_LINE", "`body` must be an object", custom_id)
    return url, body
