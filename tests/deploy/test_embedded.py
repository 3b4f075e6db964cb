"""The embedded service's own processes, without a service."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path

import pytest

from deploy.embedded import EmbeddedService, _Child
from tandem.config import ClusterConfig
from tandem.errors import ConfigError


async def test_no_process_shows_the_settings():
    """Everybody on a machine can read command lines, and a store's URL may hold a password."""
    config = ClusterConfig.from_dict({"kvstore": {"url": "redis://:hunter2@127.0.0.1:1/0"}})
    service = EmbeddedService(config)
    await service._spawn(service._router)
    shown = await asyncio.to_thread(Path(f"/proc/{service.pids()['router']}/cmdline").read_bytes)
    assert b"deploy.process" in shown
    assert b"hunter2" not in shown
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1") as refused:  # so it was told
        await service._facts(service._router)
    assert "hunter2" not in str(refused.value)
    await service._end(service._router)


async def test_modules_of_the_users_folder_are_not_taken_for_ours(tmp_path, monkeypatch):
    (tmp_path / "deploy.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    service = EmbeddedService(ClusterConfig())
    await service._spawn(service._router)
    assert "internal" in await service._facts(service._router)
    await service._end(service._router)


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
