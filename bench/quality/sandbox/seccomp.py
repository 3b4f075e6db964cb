"""A filter of system calls for this process and all it becomes (seccomp, Drewry 2012; Linux 3.5 or newer).

| call | allowed |
|---|---|
| those of `syscalls.allowed` | always |
| clone | to start a thread, never a process |
| kill, tgkill | to this process |
| prlimit64 | to read limits |
| any other | fails with ENOSYS, as on a kernel that has never heard of it |
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator

from bench.quality.sandbox.syscalls import AUDIT_ARCH, allowed, checked

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
CLONE_THREAD = 0x10000
LOAD, JUMP_IF_EQUAL, JUMP_IF_BITS, RETURN = 0x20, 0x15, 0x45, 0x06  # classic BPF: words, constants
KILL, ALLOW, FAIL = 0x80000000, 0x7FFF0000, 0x00050000
NR, ARCH, ARGS = 0, 4, 16  # offsets in struct seccomp_data, little-endian


def machine() -> str:
    """Raises `OSError` where the numbers of system calls are not known here."""
    found = platform.machine()
    if platform.system() != "Linux" or found not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no list of system calls for {platform.system()} on {found}")
    return found


def restrict() -> None:
    """Filter this process' calls from now on, for good. It must have given up new privileges before.

    Raises `OSError` if the kernel has no filters.
    """
    code = b"".join(_program(machine(), os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def prctl(option: int, *arguments: int) -> None:
    """A control of this process. Raises `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    padded = [*arguments, 0, 0, 0, 0][:4]
    if libc.prctl(option, *map(ctypes.c_ulong, padded)):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def _program(arch: str, pid: int) -> Iterator[bytes]:
    yield _load(ARCH)
    yield _instruction(JUMP_IF_EQUAL, AUDIT_ARCH[arch], 1, 0)
    yield _return(KILL)
    yield _load(NR)
    for number in allowed(arch).values():
        yield _instruction(JUMP_IF_EQUAL, number, 0, 1)
        yield _return(ALLOW)
    rules = {
        "clone": [_load(ARGS), _instruction(JUMP_IF_BITS, CLONE_THREAD, 1, 0)],
        "kill": [_load(ARGS), _instruction(JUMP_IF_EQUAL, pid, 1, 0)],
        "tgkill": [_load(ARGS), _instruction(JUMP_IF_EQUAL, pid, 1, 0)],
        "prlimit64": [  # the pointer to new limits is null
            _load(ARGS + 16),
            _instruction(JUMP_IF_EQUAL, 0, 0, 2),
            _load(ARGS + 20),
            _instruction(JUMP_IF_EQUAL, 0, 1, 0),
        ],
    }
    for name, number in checked(arch).items():
        rule = [*rules[name], _return(FAIL | errno.EPERM), _return(ALLOW)]
        yield _instruction(JUMP_IF_EQUAL, number, 0, len(rule))
        yield from rule
    yield _return(FAIL | errno.ENOSYS)


def _load(offset: int) -> bytes:
    return _instruction(LOAD, offset)


def _return(action: int) -> bytes:
    return _instruction(RETURN, action)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
