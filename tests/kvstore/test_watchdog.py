"""A sweep that hangs is noticed from outside; one that is slow, or a process that was stopped, is not taken
for stuck."""

from __future__ import annotations

import subprocess
import sys
import threading

from kvstore.backends.memory import MemoryBackend
from kvstore.store import KvStore
from kvstore.sweeper import Sweeper
from kvstore.watchdog import Watchdog
from tests.kvstore.test_service import QUICK, until

STUCK = """
import asyncio, sys, threading, time
from deploy import store as deployed
from tandem.config import ClusterConfig, KvStoreConfig
async def main():
    config = ClusterConfig(kvstore=KvStoreConfig(url=sys.argv[1], sweep_s=0.01))
    store = deployed.EmbeddedStore(config, on_hang=deployed.leave_process, tick_s=0.02)
    await store.start()
    await asyncio.sleep(0.1)
    if sys.argv[2] == "loop":
        time.sleep(60)
    store._store.turns.post(threading.Event().wait)  # a medium that never answers
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_progress_keeps_it_quiet_and_silence_does_not():
    progress, num_looks, hung = [0], 0, threading.Event()

    def look() -> int:
        nonlocal num_looks
        num_looks += 1
        progress[0] += num_looks < 100 and num_looks % 20 == 0  # every 20 ticks, and then no more
        return progress[0]

    with Watchdog(look, hung.set, tick_s=0.001, most_ticks=25):
        assert hung.wait(20.0)
    assert num_looks == 80 + 25


def test_it_leaves_with_its_context():
    hung = threading.Event()
    with Watchdog(lambda: 0, hung.set, tick_s=60.0) as watchdog:
        pass
    assert not watchdog._thread.is_alive()
    assert not hung.is_set()


async def test_every_sweep_is_progress():
    store = KvStore(MemoryBackend(), 1000, QUICK)
    async with Sweeper(store) as sweeper:
        await until(lambda: sweeper.num_sweeps > 3)


def leaves(url: str, where: str) -> int:
    command = [sys.executable, "-c", STUCK, url, where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert "the KV store's sweep stands still" in done.stderr
    return done.returncode


def test_a_process_whose_store_is_stuck_ends(tmp_path):
    assert leaves(f"disk://{tmp_path}", "medium") == 70


def test_a_process_whose_loop_is_stuck_ends():
    assert leaves("memory://", "loop") == 70
