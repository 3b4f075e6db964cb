"""The HTTP listener's sockets."""

from __future__ import annotations

import asyncio
import socket

from starlette.responses import PlainTextResponse

from router.http.server import HttpServer
from tandem.config import SecurityConfig
from tests.serving import until
from tests.web import get


async def test_a_token_does_not_wait_for_the_acknowledgement_of_the_one_before():
    """Without TCP_NODELAY the second small write of a stream waits for the peer's delayed ACK: 40 ms."""
    server = HttpServer("127.0.0.1", 0, SecurityConfig())
    await server.start(PlainTextResponse("hello"))
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    connections = server._server.server_state.connections
    await until(lambda: connections)
    [connection] = connections
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()
    await server.stop()


async def test_stopping_closes_connections_that_nobody_uses():
    server = HttpServer("127.0.0.1", 0, SecurityConfig())
    await server.start(PlainTextResponse("hello"))
    assert (await get(f"127.0.0.1:{server.port}", "/")).body == b"hello"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")  # kept alive
    await reader.readuntil(b"hello")
    async with asyncio.timeout(5):
        await server.stop()
        assert await reader.read() == b""
    writer.close()
