"""Who computes where: cores are split without overlap, and claims die with those who made them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import cores
from tandem.cores import (
    Claims,
    Member,
    cpu_quota,
    move_compute_threads,
    name_compute_thread,
    share_of,
    usable_cores,
)
from tandem.errors import ConfigError

MEMBER = """
import sys
from pathlib import Path
from tandem.cores import Claims

claims = Claims(Path(sys.argv[1]))
for line in sys.stdin:
    getattr(claims, line.strip())()
    print(claims.number, flush=True)
"""


@contextmanager
def member(path):
    """Another worker's process, which does what it is told."""
    process = subprocess.Popen(
        [sys.executable, "-c", MEMBER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def tell(what: str) -> Member:
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        return Member(int(process.stdout.readline()), process.pid)

    try:
        yield tell
    finally:
        process.kill()
        process.communicate()


@given(st.sets(st.integers(0, 63), min_size=1), st.sets(st.integers(0, 255), min_size=1))
def test_those_who_compute_split_the_cores(numbers, members):
    usable = sorted(numbers)
    shares = [share_of(member, members, usable) for member in sorted(members)]
    assert all(share <= numbers for share in shares)
    if len(members) > len(usable):
        assert all(len(share) == 1 for share in shares)
        assert set().union(*shares) == numbers
    else:
        assert sorted(core for share in shares for core in share) == usable
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_worker_that_computes_is_seen_by_the_others(tmp_path):
    path = tmp_path / "cores"
    mine = Claims(path)
    mine.begin()
    assert mine.others() == frozenset()
    with member(path) as first, member(path) as second:
        a, b = first("begin"), second("begin")
        assert len({mine.number, a.number, b.number}) == 3
        assert mine.others() == {a, b}
        first("end")
        assert mine.others() == {b}
        first("begin")
        assert mine.others() == {a, b}
    mine.close()


def test_a_killed_workers_claim_vanishes_and_its_place_is_free(tmp_path):
    path = tmp_path / "cores"
    mine = Claims(path)
    with member(path) as other:
        gone = other("begin")
        os.kill(gone.pid, signal.SIGKILL)
        end_s = time.monotonic() + 5
        while mine.others() and time.monotonic() < end_s:
            time.sleep(0.01)
        assert mine.others() == frozenset()
        with member(path) as heir:
            assert heir("begin").number == gone.number
    mine.close()


def test_a_file_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"cores\.claims .*nowhere.* cannot be opened"):
        Claims(tmp_path / "nowhere" / "cores")
    monkeypatch.setattr(cores, "MAX_MEMBERS", 1)
    path = tmp_path / "cores"
    with member(path) as other:
        other("begin")
        with pytest.raises(ConfigError, match="has 1 members; give this worker threads of its own"):
            Claims(path)


def test_only_threads_that_compute_are_moved(tmp_path):
    before = os.sched_getaffinity(0)
    first = min(before)
    ready, leave = threading.Event(), threading.Event()

    def compute() -> None:
        name_compute_thread()
        ready.set()
        leave.wait()

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        assert ready.wait(5)
        move_compute_threads(os.getpid(), {first})
        assert os.sched_getaffinity(thread.native_id) == {first}
        assert os.sched_getaffinity(0) == before
        move_compute_threads(2**22 + 1, {first})  # no such process: nothing happens
    finally:
        leave.set()
        thread.join()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000\n", float("inf")), ("250000 100000\n", 2.5), ("", float("inf")), (None, float("inf"))],
)
def test_the_quota_of_a_control_group(tmp_path, text, expected):
    file = tmp_path / "cpu.max"
    if text is not None:
        file.write_text(text)
    assert cpu_quota(file) == expected


def test_under_a_quota_nobody_chooses_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 1, 2})
    monkeypatch.setattr(cores, "cpu_quota", lambda file: 3.0)
    assert usable_cores() == [1, 2, 4]
    monkeypatch.setattr(cores, "cpu_quota", lambda file: 2.5)
    assert usable_cores() == []
