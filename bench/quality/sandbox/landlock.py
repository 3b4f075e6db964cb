"""Which files this process may touch, whoever it is (Landlock, Salaün 2021; Linux 5.13 or newer)."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # on every architecture
CREATE_RULESET_VERSION, RULE_PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1 << bit for bit in (0, 1, 2, 3, 5, 8, 14)
)
NUM_RIGHTS = {1: 13, 2: 14}  # by version of the interface
MAX_RIGHTS = 15  # of later ones that are asked for here
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
READ, RUN = READ_FILE | READ_DIR, READ_FILE | EXECUTE
WRITE = READ | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE  # files only: no folders, no links, no pipes


def restrict(readable: Sequence[Path], writable: Sequence[Path], runnable: Sequence[Path]) -> None:
    """From now on only these exist: files, or folders with all beneath. Those that are missing are left out.

    Metadata can still be read. The process must have given up new privileges before. Raises `OSError` if
    the kernel has no Landlock.
    """
    version = _call(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    everything = (1 << NUM_RIGHTS.get(version, MAX_RIGHTS)) - 1
    ruleset = _call(CREATE_RULESET, struct.pack("Q", everything), 8, 0)
    try:
        for paths, rights in ((readable, READ), (writable, WRITE), (runnable, RUN)):
            for path in paths:
                if path.exists():
                    _allow(ruleset, path, rights & everything)
        _call(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rights &= ~0 if path.is_dir() else OF_FILES
        _call(ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", rights, parent), 0)
    finally:
        os.close(parent)


def _call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    wide = (ctypes.c_long(one) if isinstance(one, int) else one for one in arguments)
    result = int(libc.syscall(ctypes.c_long(number), *wide))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
