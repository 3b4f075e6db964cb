"""A real redis-server on a free port, for one test or many.

Tests that need one are skipped where there is none, with the words of what to install; where
TANDEM_REQUIRE_REDIS is set, as in CI, they fail instead.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

MISSING = "no redis-server: run `make redis`, or install Debian's package redis-server"
PASSWORD = "correct horse"


@dataclass
class RedisServer:
    """A running server. Kill it, hold it still, start it again on the same port."""

    binary: str
    folder: Path
    port: int
    arguments: tuple[str, ...]
    tls_port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{self.port}/0"

    @property
    def tls_url(self) -> str:
        return self.url.replace("redis:", "rediss:").replace(str(self.port), str(self.tls_port))

    def start(self) -> None:
        command = [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir"]
        command += [str(self.folder), "--requirepass", PASSWORD, *self.arguments]
        command += ["--tls-port", str(self.tls_port)] if self.tls_port else []
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until_s = time.monotonic() + 20
        with self.client() as client:
            while True:
                try:
                    client.ping()
                except redis.RedisError:
                    if self.tls_port and self.process.poll() is not None:
                        pytest.skip(f"{self.binary} was built without TLS")
                    assert time.monotonic() < until_s, "redis-server does not answer"
                    time.sleep(0.02)
                else:
                    return

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=PASSWORD, socket_timeout=5)

    def key_names(self) -> list[bytes]:
        with self.client() as client:
            return list(client.scan_iter())

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def hold_still(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


def redis_binary() -> str:
    """The server's path; without one the test that asks is skipped, or fails where it must not be."""
    beside_python = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name, path=beside_python):
            return found
    if os.environ.get("TANDEM_REQUIRE_REDIS"):
        pytest.fail(MISSING)
    pytest.skip(MISSING)


@contextmanager
def running(folder: Path, *arguments: str, tls: bool = False) -> Iterator[RedisServer]:
    with socket.socket() as free, socket.socket() as another:
        free.bind(("127.0.0.1", 0))
        another.bind(("127.0.0.1", 0))
        port, tls_port = free.getsockname()[1], another.getsockname()[1] if tls else 0
    server = RedisServer(redis_binary(), folder, port, arguments, tls_port)
    server.start()
    try:
        yield server
    finally:
        server.kill()
