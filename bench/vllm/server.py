"""vLLM's own OpenAI-compatible server as a process group, which can be put to sleep between measurements."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from bench.embedded import last_words
from bench.vllm.peer import NEEDED, Settings, environment
from tandem.errors import ConfigError

MODULE = "vllm.entrypoints.openai.api_server"
HOST = "127.0.0.1"
SERVED_NAME = "checkpoint"
START_S = 900.0  # it compiles
LOOK_S, LOOK_TIMEOUT_S = 0.5, 5.0  # between two looks at whether it is there; for one of them
LEAVE_S, TIDY_S = 20.0, 5.0  # for the server to end; then for its children
GUARD = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


class VLlmServer:
    """A server that starts. It and its children are one process group."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, said: IO[str]) -> None:
        self._process = process
        self._port = port
        self._said = said
        self.url = f"http://{HOST}:{port}"

    def wait_until_ready(self) -> None:
        """Raises `ConfigError` if it ends instead, or takes too long."""
        deadline_s = time.monotonic() + START_S
        while not self._is_healthy():
            if self._process.poll() is not None:
                self._said.seek(0)
                raise ConfigError(f"vLLM's server ended: {last_words(self._said.read())}; {NEEDED}")
            if time.monotonic() > deadline_s:
                raise ConfigError(f"vLLM's server was not ready after {START_S:.0f} s")
            time.sleep(LOOK_S)

    def sleep(self) -> None:
        """No process of it gets processor time any more, until `wake`."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Asked first; its children may tidy up (shared memory) before what is left of them is killed."""
        self._process.terminate()
        self.wake()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_S)
        deadline_s = time.monotonic() + TIDY_S
        while self._signal(0) and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> bool:
        """Whether anything is left of it."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=LOOK_TIMEOUT_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()


@contextmanager
def starting(python: Path, settings: Settings) -> Iterator[VLlmServer]:
    """A server until the block ends, not ready yet. Raises `ConfigError` if there is no such program."""
    port = _free_port()
    with tempfile.TemporaryFile("w+") as said:
        try:
            process = subprocess.Popen(
                command(python, settings, port),
                stdout=said,
                stderr=said,
                env=os.environ | environment(settings),
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"vLLM's server did not start: {error}; {NEEDED}") from error
        server = VLlmServer(process, port, said)
        with _guarding(process.pid):
            try:
                yield server
            finally:
                server.end()


@contextmanager
def _guarding(group: int) -> Iterator[None]:
    """If we are killed in this block, so is the group: what is asleep cannot notice that we have gone."""
    command = [sys.executable, "-I", "-c", GUARD, str(group)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.kill()


def command(python: Path, settings: Settings, port: int) -> list[str]:
    """As a user would start it, without what helps only with equal prompts or costs only time."""
    options = {
        "model": settings.model,
        "served-model-name": SERVED_NAME,
        "host": HOST,
        "port": port,
        "dtype": settings.dtype,
        "max-model-len": settings.max_tokens,
        "max-num-seqs": settings.max_sequences,
        "seed": 0,
    }
    if settings.step_tokens is not None:
        options["max-num-batched-tokens"] = settings.step_tokens
    words = [f"--{name}={value}" for name, value in options.items()]
    flags = ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    return [str(python), "-I", "-m", MODULE, *words, *flags]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        return int(listening.getsockname()[1])
