"""Builds the C++ kernels with the system's compiler when they are first needed, and keeps the result.

`TANDEM_NATIVE` chooses the instruction set: `auto` (default, the best this CPU runs), `avx512bf16` (AVX-512
that multiplies bfloat16), `avx512`, `avx2`, `plain`, or `off`. Libraries lie in `TANDEM_CACHE` (default
`$XDG_CACHE_HOME/tandem`, `~/.cache/tandem`), named by the hash of what made them, so that a changed source or
compiler never meets an old library.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tandem.errors import ConfigError

SOURCES = Path(__file__).parent / "src"
MAIN = "decoder.cpp"
AVX512 = frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"})
NEEDS = {  # instruction set → what /proc/cpuinfo must list
    "avx512bf16": AVX512 | {"avx512_bf16"},
    "avx512": AVX512,
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "plain": frozenset[str](),
}
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512bf16": (*AVX512_FLAGS, "-mavx512bf16"),
    "avx512": AVX512_FLAGS,
    "avx2": AVX2_FLAGS,
    "plain": (),
}
# No contraction: a fused multiply-add stands in the source, or there is none. That keeps the bits equal.
# Hidden, or libraries of several instruction sets in one process would share their static variables.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared", "-pthread")
BUILD_TIMEOUT_S = 300.0


class NotNativeError(Exception):
    """The kernels cannot run here; the message says why."""


def instruction_set() -> str:
    """What to build for. Raises `NotNativeError` if the CPU would be slow or `TANDEM_NATIVE` says off."""
    wanted = os.environ.get("TANDEM_NATIVE", "auto")
    if wanted == "off":
        raise NotNativeError("TANDEM_NATIVE is off")
    if wanted not in (*NEEDS, "auto"):
        raise ConfigError(f"TANDEM_NATIVE must be auto, off, {', '.join(NEEDS)}, not {wanted}")
    has = cpu_flags()
    if wanted != "auto":
        missing = NEEDS[wanted] - has
        if missing:
            raise ConfigError(f"TANDEM_NATIVE={wanted}: this CPU lacks {', '.join(sorted(missing))}")
        return wanted
    for name in ("avx512bf16", "avx512", "avx2"):
        if NEEDS[name] <= has:
            return name
    raise NotNativeError("the CPU has no AVX2, and without it the kernels are slower than torch's")


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction set extensions by Linux's names; empty where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def library(isa: str) -> Path:
    """The library for this instruction set, built now if need be. Raises `NotNativeError`."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise NotNativeError("there is no C++ compiler (Debian: apt-get install g++)")
    folder = cache_folder()
    file = folder / f"native-{isa}-{_recipe(compiler, isa)}.so"
    if file.exists():
        return file
    with (folder / f"native-{isa}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together build once
        if not file.exists():
            _compile(compiler, isa, file)
    return file


def cache_folder() -> Path:
    """Where libraries are kept: ours alone, since what lies there is run."""
    base = os.environ.get("TANDEM_CACHE")
    folder = (
        Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
    )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise NotNativeError(f"{folder} cannot be used ({error}); set TANDEM_CACHE to a folder") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise NotNativeError(f"{folder} must belong to this user and be writable by nobody else")
    return folder


def _recipe(compiler: str, isa: str) -> str:
    """Hash of the sources, the flags and the compiler's version."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=30).stdout
    digest = hashlib.sha256(version + repr((FLAGS, ISA_FLAGS[isa])).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, isa: str, file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        built = Path(scratch) / file.name
        command = [compiler, *FLAGS, *ISA_FLAGS[isa], "-o", str(built), str(SOURCES / MAIN)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotNativeError(f"{compiler} did not run: {error}") from error
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
            raise NotNativeError(f"{compiler} failed: {last[0]}")
        built.replace(file)  # whoever sees the name sees a whole library
