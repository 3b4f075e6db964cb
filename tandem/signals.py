"""Signals to child processes of an event loop."""

from __future__ import annotations

import os
import signal
from asyncio.subprocess import Process
from contextlib import suppress


def send(process: Process, number: signal.Signals) -> None:
    """Like `process.send_signal`, which polls first: of a child that has just ended it would take the exit
    code away from asyncio's watcher, who then reports 255 for an unknown child process."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
