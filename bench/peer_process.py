"""A peer in a process of its own, in the Python that has it: one JSON request a line, one answer a line."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

from tandem.errors import ConfigError


class PeerProcess:
    """A child that answers. Subclasses say what it is, and what its Python needs."""

    name = ""
    needed = ""

    def __init__(self, child: subprocess.Popen[str], errors: IO[str]) -> None:
        self._child = child
        self._errors = errors

    @classmethod
    @contextmanager
    def started(cls, command: list[str], environment: Mapping[str, str] | None = None) -> Iterator[Self]:
        """`environment` is added to our own. Raises `ConfigError` if there is no such program."""
        variables = os.environ | (environment or {})
        pipe = subprocess.PIPE
        with tempfile.TemporaryFile("w+") as errors:
            try:
                child = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=variables
                )
            except OSError as error:
                raise ConfigError(f"{cls.name} did not start: {error}; {cls.needed}") from error
            with child:
                try:
                    yield cls(child, errors)
                finally:
                    child.kill()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer. Raises `ConfigError` if the child has ended."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):  # its end shows below
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            self._child.wait()
            self._errors.seek(0)
            raise ConfigError(f"{self.name} ended: {last_line(self._errors.read())}; {self.needed}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def command(python: Path, script: Path, *arguments: str) -> list[str]:
    """To run a script that finds nothing of ours."""
    return [str(python), "-I", str(script), *arguments]


def last_line(text: str) -> str:
    """What a program that failed said at last."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]
