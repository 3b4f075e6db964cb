"""One program at a time into a folder and a process of its own, and what became of it.

1. The program is written into a new folder, with a last line that only a program that got there executes.
2. `launch` builds the walls and becomes the program. Without walls nothing runs.
3. Time that stands still is ended from here: a limit of the wall clock, and one of the folder's size.
4. It passed if its last line was executed; whatever it exited with says nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.quality.sandbox.launch import WALLED
from bench.quality.sandbox.probe import PROBE
from tandem.errors import ConfigError
from tandem.signals import send

LOOK_EVERY_S = 0.05
START_S = 60.0  # of Python and the walls, on the busiest of machines
FILE_ITSELF = 4096  # bytes that an empty file takes, too
SAID_BYTES = 20_000  # of its last words that are read
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 * MIB  # of address space
    file_bytes: int = MIB  # each
    folder_bytes: int = 16 * MIB  # all files together
    open_files: int = 64

    def to_json(self) -> str:
        """By the names of `setrlimit`."""
        limits = {"CPU": self.cpu_s, "AS": self.memory_bytes, "FSIZE": self.file_bytes}
        return json.dumps({**limits, "NOFILE": self.open_files, "CORE": 0, "MEMLOCK": 0})


@dataclass(frozen=True, slots=True)
class Verdict:
    """`why` is one line, empty if it passed."""

    passed: bool
    why: str = ""


class Sandbox:
    """Runs Python programs that nobody has read. Call `check` first."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    async def check(self) -> None:
        """Try the walls with a program that runs against each. Raises `ConfigError` if one is missing."""
        verdict = await self.run(PROBE)
        if not verdict.passed:
            raise ConfigError(f"the sandbox does not hold, so no candidates are run: {verdict.why}")

    async def run(self, program: str) -> Verdict:
        """To its end or its limits. Raises `ConfigError` if the walls cannot be built."""
        with tempfile.TemporaryDirectory(prefix="tandem-candidate-") as name:
            folder, token = Path(name), secrets.token_hex(16)
            file = folder / "program.py"
            end = f"\nwith open({str(folder / 'passed')!r}, 'w') as _file:\n    _file.write({token!r})\n"
            file.write_text(program + end, encoding="utf-8", errors="replace")
            with (folder / "stderr").open("wb") as stderr:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-m", "bench.quality.sandbox.launch"),
                    *(self.limits.to_json(), str(file)),
                    stdin=DEVNULL,
                    stdout=PIPE,
                    stderr=stderr,
                    cwd=folder,
                    env={},
                    start_new_session=True,
                )
            try:
                why = await self._watch(process, folder)
            finally:
                await _end(process)
            if _read(folder / "passed") == token and not why:
                return Verdict(True)
            return Verdict(False, why or _last_words(process, folder))

    async def _watch(self, process: Process, folder: Path) -> str:
        """Until the program ends, or what it used too much of. Raises `ConfigError` without walls."""
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            said = await process.stdout.read()
        if said != WALLED:
            raise ConfigError(f"no candidates are run here, as their walls are missing: {_said(folder)}")
        deadline_s = time.monotonic() + self.limits.wall_s
        ended = asyncio.ensure_future(process.wait())
        try:
            while not ended.done():
                if time.monotonic() >= deadline_s:
                    return f"it ran longer than {self.limits.wall_s:g} s"
                if _size(folder) > self.limits.folder_bytes:
                    return "its files took too much room"
                await asyncio.wait([ended], timeout=LOOK_EVERY_S)
        finally:
            ended.cancel()
        return ""


async def _end(process: Process) -> None:
    """It is the only one: walled programs cannot start others."""
    if process.returncode is None:
        send(process, signal.SIGKILL)
    await process.wait()


def _last_words(process: Process, folder: Path) -> str:
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "it used too much CPU time"
    if process.returncode is not None and process.returncode < 0:
        return f"it was ended by {signal.Signals(-process.returncode).name}"
    return _said(folder) or f"it ended early, with {process.returncode}"


def _said(folder: Path) -> str:
    """The last line on standard error: a traceback's reason."""
    lines = _read(folder / "stderr").strip().splitlines()
    return lines[-1][:200] if lines else ""


def _read(file: Path) -> str:
    """The end of a file that a stranger may have written, removed or locked."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(file.stat().st_size - SAID_BYTES, 0))
            return opened.read(SAID_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _size(folder: Path) -> int:
    """Bytes of its files, of which there may be many, and fewer a moment later. It has no folders."""
    total = 0
    for entry in os.scandir(folder):
        with suppress(OSError):
            total += FILE_ITSELF + entry.stat(follow_symlinks=False).st_size
    return total
