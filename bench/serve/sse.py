"""Just enough HTTP/1.1 to read small pages, and to post JSON and read event streams, hundreds at once."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

DATA = b"data:"
DONE = b"[DONE]"
MAX_LINE = 1 << 20


async def post_events(
    host: str,
    port: int,
    path: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    tls: ssl.SSLContext | None = None,
) -> AsyncGenerator[dict[str, Any]]:
    """The JSON of each event until `[DONE]`. An answer that is no 200 is one event with `error`.

    Raises `OSError` if the connection fails or ends early.
    """
    reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=MAX_LINE)
    try:
        data = json.dumps(body).encode()
        head = {
            "Host": f"{host}:{port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            "Connection": "close",
            **headers,
        }
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + data)
        status, is_chunked = await _read_head(reader)
        parts = _chunks(reader) if is_chunked else _until_end(reader)
        if status != 200:
            content = b"".join([part async for part in parts])
            yield {"error": _error(status, content)}
            return
        async for event in _events(parts):
            yield event
    except (EOFError, ValueError) as error:
        raise ConnectionError(f"the stream ended early or is no event stream: {error}") from error
    finally:
        writer.close()


async def get(
    host: str, port: int, path: str, headers: Mapping[str, str], tls: ssl.SSLContext | None = None
) -> bytes:
    """The body of a small page. Raises `OSError` if there is none, or no 200."""
    reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=MAX_LINE)
    try:
        head = {"Host": f"{host}:{port}", "Connection": "close", **headers}
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        status, is_chunked = await _read_head(reader)
        parts = _chunks(reader) if is_chunked else _until_end(reader)
        content = b"".join([part async for part in parts])
        if status != 200:
            raise ConnectionError(f"{path} answered {status}")
        return content
    except (EOFError, ValueError) as error:
        raise ConnectionError(f"{path} ended early: {error}") from error
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status, and whether the body comes in chunks."""
    lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    return int(lines[0].split()[1]), b"transfer-encoding: chunked" in lines


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).partition(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _until_end(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(MAX_LINE):
        yield part


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(DATA):
                continue
            data = line[len(DATA) :].strip()
            if data == DONE:
                return
            yield json.loads(data)
    raise EOFError("there was no [DONE]")


def _error(status: int, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)["error"]
        return dict(found) if isinstance(found, dict) else {"code": f"HTTP_{status}"}
    except (ValueError, KeyError, TypeError):
        return {"code": f"HTTP_{status}"}
