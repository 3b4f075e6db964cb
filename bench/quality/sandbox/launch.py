"""Builds the walls around this process, then becomes the program: `python -m … LIMITS PROGRAM`.

A launcher of its own, as walls cannot be taken down again. It says `walled` on standard output when all
stand, and nothing of the program runs before that. Limits and other walls outlive `execve`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import sysconfig
from pathlib import Path

from bench.quality.sandbox import landlock, seccomp

WALLED = b"walled\n"
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
DEVICES = ("/dev/zero", "/dev/random", "/dev/urandom")


def main() -> None:
    """Raises `OSError` if a wall cannot be built."""
    limits, program = json.loads(sys.argv[1]), Path(sys.argv[2])
    seccomp.prctl(seccomp.PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive who asked
    seccomp.prctl(seccomp.PR_SET_NO_NEW_PRIVS, 1)
    python = Path(sys.executable).resolve()
    own = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_config_var("LIBDIR"))
    readable = [Path(path) for path in (*own, *LIBRARIES, *DEVICES) if path]
    loaders = [Path(path) for path in (*LIBRARIES[:4], sysconfig.get_config_var("LIBDIR")) if path]
    null = os.open(os.devnull, os.O_WRONLY)
    landlock.restrict(readable, [program.parent, Path(os.devnull)], [python, *loaders])
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    seccomp.restrict()
    os.write(sys.stdout.fileno(), WALLED)
    os.dup2(null, sys.stdout.fileno())
    os.execve(python, [str(python), "-I", "-S", "-B", str(program)], {})


if __name__ == "__main__":
    main()
