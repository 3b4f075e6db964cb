"""Who computes on which cores of a machine that several workers share.

Workers that compute at the same time split the cores; one that computes alone has them all. Who computes is
told by locks on the bytes of a *claims file*, which is never written: the kernel takes a process's locks away
however it ends, so a killed worker's cores are free at once.

| byte            | locked by                          |
|-----------------|------------------------------------|
| n               | member n, as long as it lives      |
| MAX_MEMBERS + n | member n, while it computes        |

Members are processes: locks of one process do not meet each other. Linux only, as affinity is.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tandem.errors import ConfigError

MAX_MEMBERS = 256
COMPUTE_THREAD = "tandem-compute"  # the name of every thread that runs kernels
_FLOCK = struct.Struct("@hhqqi0q")  # l_type, l_whence, l_start, l_len, l_pid


class Member(NamedTuple):
    """Another worker that computes now."""

    number: int
    pid: int  # 0 where it cannot be seen from here, as from another container


class Claims:
    """This process's place in a claims file. Used by one thread."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cores.claims {path} cannot be opened ({error.strerror}): name a file that all workers of "
                "this machine may write"
            ) from error
        self.number = self._join(path)

    @property
    def name(self) -> str:
        """The same for all who share these cores, and for nobody else on any machine."""
        file, boot = os.fstat(self._fd), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{file.st_dev}/{file.st_ino}"

    def begin(self) -> None:
        """From now on this worker computes."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, MAX_MEMBERS + self.number)

    def end(self) -> None:
        """Now it waits for work."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, MAX_MEMBERS + self.number)

    def others(self) -> frozenset[Member]:
        """Who else computes now."""
        return frozenset(self._locked(MAX_MEMBERS, 2 * MAX_MEMBERS))

    def close(self) -> None:
        """Leave, as the end of the process does."""
        os.close(self._fd)

    def _join(self, path: Path) -> int:
        for number in range(MAX_MEMBERS):
            with suppress(BlockingIOError, PermissionError):  # taken
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
                return number
        raise ConfigError(f"{path} has {MAX_MEMBERS} members; give this worker threads of its own")

    def _locked(self, start: int, stop: int) -> Iterator[Member]:
        """The kernel names one lock of a range, whichever: look on both sides of it."""
        if start >= stop:
            return
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, stop - start, 0)
        kind, _, at, _, pid = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        if kind == fcntl.F_UNLCK:
            return
        yield Member(at - MAX_MEMBERS, max(pid, 0))
        yield from self._locked(start, at)
        yield from self._locked(at + 1, stop)


def share_of(number: int, computing: Collection[int], cores: Sequence[int]) -> frozenset[int]:
    """The cores of member `number` among those that compute: a run of neighbours nobody else has, as long as
    the others' but for one; where there are more members than cores, one core."""
    rank, count, total = sorted(computing).index(number), len(computing), len(cores)
    if count > total:
        return frozenset({cores[rank % total]})
    return frozenset(cores[total * rank // count : total * (rank + 1) // count])


def usable_cores() -> list[int]:
    """What this process may run on. Empty where nobody may choose among them: this is not Linux, or a
    control group pays for fewer than it shows, and which ones is the kernel's choice."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return cores if cpu_quota(Path("/sys/fs/cgroup/cpu.max")) >= len(cores) else []


def cpu_quota(file: Path) -> float:
    """How many cores a control group (version 2) pays for; infinite where it says nothing."""
    try:
        quota, period = file.read_text().split()
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if quota == "max" else int(quota) / int(period)


def name_compute_thread() -> None:
    """Name the calling thread, and those it starts in native code, as threads that compute."""
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(COMPUTE_THREAD)


def move_compute_threads(pid: int, cores: Collection[int]) -> None:
    """Let a process's compute threads run on these cores only. One that is gone, or is not ours, stays."""
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                if (task / "comm").read_text().rstrip() == COMPUTE_THREAD:
                    os.sched_setaffinity(int(task.name), cores)
