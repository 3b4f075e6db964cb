"""Workers on shared cores: alone on all of them, apart when both compute, and a killed one's come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch

from tandem.config import CoresConfig
from tandem.cores import usable_cores
from tandem.engine import cores
from tandem.engine.batch import SequenceRows
from tandem.engine.cores import OwnCores, cores_of
from tandem.engine.native import build, library
from tests.serving import make_model

WORKER = """
import json, os, sys
from pathlib import Path
import torch
from tandem.config import CoresConfig
from tandem.cores import COMPUTE_THREAD
from tandem.engine.cores import cores_of

shared = cores_of(CoresConfig(claims=Path(sys.argv[1])), 0)
for line in sys.stdin:
    getattr(shared, line.strip())()
    torch.randn(512, 512) @ torch.randn(512, 512)  # so that torch's own threads are there
    found = {}
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == COMPUTE_THREAD:
            found[task.name] = sorted(os.sched_getaffinity(int(task.name)))
    widths = [shared.num_cores, torch.get_num_threads()]
    print(json.dumps([*widths, os.getpid(), found, shared.name]), flush=True)
"""
pytestmark = pytest.mark.skipif(len(usable_cores()) < 2, reason="needs two cores to share")
ALL = usable_cores()


class Worker:
    """A process that takes and rests as a step thread does."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def do(self, what: str) -> set[int]:
        """Take or rest; the cores it may compute on then."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        num_cores, threads, self.pid, found, self.name = json.loads(self.process.stdout.readline())
        self.threads = [int(name) for name in found]
        assert num_cores == threads
        assert len(self.threads) >= threads
        self.width = threads  # of its next forward
        return self.cores()

    def cores(self) -> set[int]:
        """Now, in the middle of whatever it does."""
        placed = {frozenset(os.sched_getaffinity(thread)) for thread in self.threads}
        assert len(placed) == 1
        return set(*placed)


@contextmanager
def worker(path):
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.communicate()


def in_a_step_thread(compute) -> None:
    """It names the thread and changes how many torch has, which this one must not."""
    before = torch.get_num_threads()
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    torch.set_num_threads(before)


def test_two_workers_share_the_cores(tmp_path):
    path = tmp_path / "cores"
    with worker(path) as prefill, worker(path) as decode:
        assert prefill.do("take") == set(ALL)
        assert prefill.width == len(ALL)
        mine = decode.do("take")
        assert prefill.name == decode.name
        assert decode.width == len(mine)
        # Its threads have moved, though it knows nothing of it before its next step.
        assert prefill.cores() == set(ALL) - mine
        assert prefill.do("take") == set(ALL) - mine
        assert prefill.width == len(ALL) - len(mine)
        prefill.do("rest")
        assert decode.do("take") == set(ALL)
        os.kill(decode.pid, signal.SIGSTOP)  # in the middle of a step
        assert prefill.do("take").isdisjoint(decode.cores())
        os.kill(decode.pid, signal.SIGKILL)
        decode.process.wait()
        assert prefill.do("take") == set(ALL)


def test_a_forward_is_the_same_on_any_cores(tmp_path):
    """Its kernels' threads, too, are there again when it has as many cores as before."""
    shared = cores_of(CoresConfig(claims=tmp_path / "cores"), 0)
    found = []

    def compute() -> None:
        model = make_model()
        for is_alone in (True, False, True):
            with worker(tmp_path / "cores") as other:
                if not is_alone:
                    other.do("take")
                shared.take()
                logits = model.forward(model.batch([SequenceRows(range(40), 0, range(3))]))
                team = None if model.implementation != "native" else library.engine(build.instruction_set())
                found.append((shared.num_cores, team, logits.clone()))
            shared.rest()

    in_a_step_thread(compute)
    assert [count for count, _, _ in found] == [len(ALL), len(ALL) - len(ALL) // 2, len(ALL)]
    assert found[0][1] is found[2][1]
    assert all(torch.equal(logits, found[0][2]) for _, _, logits in found)


def test_without_a_claims_file_nothing_is_shared(tmp_path, monkeypatch):
    assert isinstance(cores_of(CoresConfig(), 0), OwnCores)
    own = cores_of(CoresConfig(claims=tmp_path / "cores"), 3)
    own.take()
    assert (own.num_cores, own.name) == (3, "")
    assert not (tmp_path / "cores").exists()
    monkeypatch.setattr(cores, "usable_cores", list)  # under a quota
    assert cores_of(CoresConfig(claims=tmp_path / "cores"), 0).num_cores == 1


def test_cores_of_other_claims_files_have_other_names(tmp_path):
    names = {cores_of(CoresConfig(claims=tmp_path / file), 0).name for file in "aab"}
    assert len(names) == 2
    assert "" not in names


def test_threads_that_are_in_place_are_left_alone(tmp_path, monkeypatch):
    """Looking at all of a process's threads takes most of a millisecond, in front of a first token."""
    moved = []
    monkeypatch.setattr(cores, "move_compute_threads", lambda pid, to: moved.append(set(to)))
    shared = cores_of(CoresConfig(claims=tmp_path / "cores"), 0)

    def compute() -> None:
        for _ in range(3):
            shared.take()
            shared.rest()
        os.sched_setaffinity(0, ALL[:1])  # as another worker would
        shared.take()

    in_a_step_thread(compute)
    assert moved == [set(ALL)]
