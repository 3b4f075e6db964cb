"""The entry point of the service's processes."""

from __future__ import annotations

import asyncio
import io
import sys
from unittest.mock import AsyncMock, MagicMock

import uvloop

from deploy import process
from tandem.config import ClusterConfig


def test_a_process_of_the_service_runs_on_uvloop(monkeypatch):
    """A message of a running stream costs the router an eighth less than on asyncio's own loop."""
    loops = []

    async def main(role, config, worker_id):
        loops.append(type(asyncio.get_running_loop()))

    monkeypatch.setattr(process, "_main", main)
    for name in ("log", "keep_pages"):  # they change the process, which is pytest's here
        monkeypatch.setattr(process, name, MagicMock())
    monkeypatch.setattr(sys, "argv", ["process", "router"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{ClusterConfig().to_json()}\n"))
    process.main()
    assert loops == [uvloop.Loop]
    process.main()  # whoever started it has gone and says nothing
    assert loops == [uvloop.Loop]


async def test_a_worker_that_is_ready_keeps_what_it_has_loaded(monkeypatch):
    told, leave = [], asyncio.Event()
    leave.set()
    server = MagicMock(kernels="", stop=AsyncMock(), start=AsyncMock())
    server.start.return_value = server
    monkeypatch.setattr("decode_worker.server.DecodeServer", server)
    monkeypatch.setattr(process, "keep_objects", lambda: told.append("kept"))
    monkeypatch.setattr(process, "_say", lambda **facts: told.append("said"))
    await process.run_worker("decode", ClusterConfig(), leave, "decode-0", asyncio.Future())
    assert told == ["kept", "said"]
