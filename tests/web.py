"""HTTP by hand, for what no client library sends."""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass
from typing import Any

PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The reason of an error."""
        return self.json()["error"]["code"]


async def send(address: str, head: str, body: bytes = b"", tls: ssl.SSLContext | None = None) -> Reply:
    """One request on a connection of its own: `head` is the request line and headers, without the length."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(host, int(port), ssl=tls)
        try:
            lines = [*head.splitlines(), "host: test", "connection: close", f"content-length: {len(body)}"]
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            raw = await reader.read()
        finally:
            writer.close()
    if not raw:
        raise ConnectionError("hung up without a reply")
    top, _, rest = raw.partition(b"\r\n\r\n")
    status, *headers = top.decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in headers)
    return Reply(int(status.split()[1]), fields, rest)


async def post(address: str, path: str, value: object, token: str | None = None, **options: Any) -> Reply:
    """A JSON value; `bytes` go as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = f"POST {path} HTTP/1.1\ncontent-type: application/json{_bearer(token)}"
    return await send(address, head, body, **options)


async def get(address: str, path: str, token: str | None = None, **options: Any) -> Reply:
    return await send(address, f"GET {path} HTTP/1.1{_bearer(token)}", **options)


def _bearer(token: str | None) -> str:
    return f"\nauthorization: Bearer {token}" if token else ""
