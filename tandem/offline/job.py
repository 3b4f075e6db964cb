"""What a queue was started with, how far it is, and the lock that keeps a second runner away.

Beside `results.jsonl` lie `results.jsonl.state`, replaced as a whole about once a second, and
`results.jsonl.lock`, which holds the process id of whoever works on the queue.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError
from tandem.offline.journal import replace_file

VERSION = 1
LOCK_TRIES = 5
LOCK_RETRY_S = 0.05


class InUseError(ConfigError):
    """Another process works on this queue."""


@dataclass(frozen=True, slots=True)
class Job:
    """The header of a queue. Its results belong together only while input, model and defaults stay the same.

    It is written first with what was asked for, and again when the input has been checked.
    """

    input: str
    defaults: dict[str, Any]  # of bodies that stand alone
    service: dict[str, Any]  # the options that name the service
    created_s: float  # wall clock
    input_sha256: str = ""  # empty until checked
    total: int = 0  # lines that are not blank
    num_bad: int = 0
    model: str = ""
    model_fingerprint: str = ""
    queue: str = ""  # the name of its queue in Redis, if it is in one
    owner: str = ""  # a secret that makes that queue this job's
    is_cancelled: bool = False
    progress: dict[str, Any] = field(default_factory=dict)  # the last that the runner said
    version: int = VERSION

    def with_progress(self, progress: dict[str, Any]) -> Job:
        return replace(self, progress=progress)

    @property
    def is_checked(self) -> bool:
        return bool(self.input_sha256)

    def check_same(self, input_sha256: str, model_fingerprint: str) -> None:
        """Raise `ConfigError` if what comes now would not belong to what is there."""
        if self.input_sha256 != input_sha256:
            raise ConfigError(
                f"{self.input} has changed since this queue was started; "
                "restore it, or give a new --output for new work"
            )
        if self.model_fingerprint != model_fingerprint:
            raise ConfigError(
                f"this queue was started with {self.model} in another build; serve that one, "
                "or give a new --output"
            )


def state_path(output: Path) -> Path:
    return output.with_name(output.name + ".state")


def load_job(output: Path) -> Job | None:
    """None if no queue was started with this output. Raises `ConfigError` if the state is unreadable."""
    path = state_path(output)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        if values.get("version") != VERSION:
            raise ValueError(f"version {values.get('version')} is not {VERSION}")
        return Job(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a queue's state ({error}); give a new --output") from error


def save_job(output: Path, job: Job) -> None:
    """Replace the state as a whole, on disk before it is seen."""
    replace_file(state_path(output), json.dumps(asdict(job)))


def check_paths(input_: Path, output: Path) -> None:
    """Refuse what cannot work before anything is touched. Raises `ConfigError`."""
    if not input_.is_file():
        raise ConfigError(f"{input_} is no file; give the JSONL file with the requests")
    if not output.parent.is_dir():
        raise ConfigError(f"there is no folder {output.parent} for the results; make it first")
    if output.exists() and output.samefile(input_):
        raise ConfigError("--output is the input file; give another path for the results")
    if output.is_symlink():
        raise ConfigError(f"cannot write {output}: it is a symbolic link")
    if output.exists() and output.stat().st_size and not state_path(output).exists():
        raise ConfigError(f"{output} exists and is no queue's; give another --output, or remove it")


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the queue alone. Raises `InUseError` with the holder's process id."""
    path = output.with_name(output.name + ".lock")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    try:
        if not _lock_soon(fd):
            raise InUseError(f"{output} is in use by process {os.pread(fd, 32, 0).decode()}")
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def _lock_soon(fd: int) -> bool:
    """Whoever only asks `holder` has the file locked for an instant: try more than once."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_RETRY_S)
        else:
            return True
    return False


def holder(output: Path) -> int | None:
    """The process that works on this queue now, or None."""
    path = output.with_name(output.name + ".lock")
    if not path.exists():
        return None
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(os.pread(file.fileno(), 32, 0) or 0)
    return None
