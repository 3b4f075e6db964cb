"""The embedded service's own processes, without a service."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

from deploy.embedded import EmbeddedService, _Child


async def test_the_exit_code_of_a_child_that_has_just_ended_is_not_lost(monkeypatch):
    """Whoever polls it before asyncio's watcher has waited for it would take the code away: the watcher then
    warns of an unknown child process and reports 255."""
    told, waitpid = threading.Event(), os.waitpid

    def wait_late(pid, options):
        if threading.current_thread() is not threading.main_thread():
            assert told.wait(10)
        return waitpid(pid, options)

    monkeypatch.setattr(os, "waitpid", wait_late)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(7)")
    await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    ending = asyncio.create_task(EmbeddedService._end(_Child("decode", "decode-0", process)))
    await asyncio.sleep(0)
    told.set()
    await ending
    assert process.returncode == 7
