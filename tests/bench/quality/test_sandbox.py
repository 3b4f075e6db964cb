"""Programs that attack: each is contained, counted as a failure, and gone afterwards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bench.quality.sandbox.probe import PROBE
from bench.quality.sandbox.run import Limits, Sandbox
from bench.quality.sandbox.syscalls import allowed, checked
from tandem.errors import ConfigError

LIMITS = Limits(wall_s=30.0, cpu_s=1)
IMPATIENT = Limits(wall_s=1.5, cpu_s=1)  # with what only the time on the wall ends
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def candidates_left() -> list[str]:
    """Processes that run in a candidate's folder, and such folders."""
    here = tempfile.gettempdir()
    running = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            running.append(os.readlink(process / "cwd"))
        except OSError:
            continue
    folders = [str(path) for path in Path(here).glob("tandem-candidate-*")]
    return [path for path in [*running, *folders] if path.startswith(f"{here}/tandem-candidate-")]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Candidates' folders of this test alone; nothing may be left of them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert candidates_left() == []


async def test_a_good_program_passes_and_its_walls_hold() -> None:
    await Sandbox().check()
    assert (await Sandbox().run("import math, re, heapq\nassert math.gcd(12, 18) == 6")).passed


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("while True: pass", "CPU time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "CPU time"),
        ("import time\ntime.sleep(60)", "longer than 1.5 s"),
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['/bin/sleep', '60'])", "PermissionError"),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", ""),
        ("data = bytearray(10 << 30)", "MemoryError"),
        ("data = []\nwhile True: data.append(bytes(1 << 20))", "MemoryError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "not implemented"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import os\nos.kill(-1, 9)", "PermissionError"),
        ("while True: print('x' * 1000)", "CPU time"),
        (
            "number = 0\nwhile True: open(str(number := number + 1), 'w').write('x' * 1000000)",
            "too much room",
        ),
        ("open('large', 'w').write('x' * 2000000)", "File too large"),
        ("import os\nwhile True: os.mkdir('x'); os.chdir('x')", "PermissionError"),
        ("import os\nos.remove('stderr')\nos.symlink('/etc/passwd', 'stderr')", "ended early"),
        ("raise SystemExit(0)", "ended early"),
        ("import os\nos._exit(0)", "ended early"),
        ("import os\nos.abort()", "SIGABRT"),
        ("assert 1 + 1 == 3, 'sum'", "AssertionError: sum"),
        ("def broken(:", "SyntaxError"),
    ],
)
async def test_an_attack_is_contained_and_fails(program: str, why: str) -> None:
    verdict = await Sandbox(IMPATIENT if "time.sleep" in program else LIMITS).run(program)
    assert not verdict.passed
    assert why in verdict.why
    assert "longer than 30" not in verdict.why


async def test_files_outside_stay_and_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("do not read")
    for attempt in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w')",
        f"import os\nos.remove({str(secret)!r})",
        f"import os\nos.rename('program.py', {str(secret)!r})",
        f"import os\nos.truncate({str(secret)!r}, 0)",
        f"import os\nos.chmod({str(secret)!r}, 0o777)",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
    ):
        verdict = await Sandbox(LIMITS).run(attempt)
        assert not verdict.passed, attempt
    assert secret.read_text() == "do not read"


async def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THIS_TEST", "x")
    assert (await Sandbox(LIMITS).run("import os\nassert not set(os.environ) - {'LC_CTYPE'}")).passed


def python_that(does: str, folder: Path) -> str:
    """An interpreter that does something else first when it is asked to launch a candidate."""
    file = folder / "python"
    file.write_text(f"#!{sys.executable}\nimport os, sys\n{does}\n")
    file.chmod(0o755)
    return str(file)


WITHOUT_LANDLOCK = f"""
from bench.quality.sandbox import seccomp
seccomp.prctl(seccomp.PR_SET_NO_NEW_PRIVS, 1)
seccomp.restrict()  # which knows nothing of Landlock
os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
"""
WITHOUT_WALLS = f"""
os.write(1, b"walled\\n")
os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
os.execv({sys.executable!r}, [{sys.executable!r}, sys.argv[-1]])
"""


async def test_nothing_runs_where_a_wall_cannot_be_built(tmp_path: Path, monkeypatch) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setattr(sys, "executable", python_that(WITHOUT_LANDLOCK, tmp_path))
    with pytest.raises(ConfigError, match=r"walls are missing: .*not implemented"):
        await Sandbox(LIMITS).run(f"open({str(ran)!r}, 'w')")
    assert not ran.exists()


async def test_a_wall_that_stands_but_does_not_hold_is_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", python_that(WITHOUT_WALLS, tmp_path))
    with pytest.raises(ConfigError, match="does not hold, so no candidates are run: a program can read"):
        await Sandbox(LIMITS).check()
    assert "read a file" in PROBE


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_numbers_are_those_of_the_kernel(machine: str) -> None:
    """As the C headers of this machine say, where they are installed."""
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not installed")
    command = ["cc", "-E", "-dM", "-D__BITS_PER_LONG=64", "-D__ARCH_WANT_NEW_STAT", str(HEADERS[machine])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"#define (__NR\w*) (\w+)", said))
    for name, number in {**allowed(machine), **checked(machine)}.items():
        value = found[f"__NR_{name}"]
        while value in found:  # the generic header has names for some numbers
            value = found[value]
        assert int(value) == number, name
