"""`tandem queue` on a queue in Redis, from any machine that reaches it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from rich.console import Console

from deploy.commands.queue import service_of
from deploy.queue.display import Display
from deploy.queue.joining import Worker, facts
from tandem.offline.progress import Progress
from tandem.offline.runner import Limits
from tandem.offline.shared.queue import SharedQueue

LOOK_EVERY_S = 0.5


def work(url: str, name: str, service: dict[str, Any], limits: Limits) -> int:
    """Work on the queue to its end; returns the exit code. Raises `ConfigError`."""
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    return asyncio.run(Worker(SharedQueue(url, name), service_of(service), limits, err).run())


def status(url: str, name: str, as_json: bool) -> None:
    """How far the queue is. Raises `ConfigError` if there is none."""
    queue = SharedQueue(url, name)
    queue.check_server()
    _say(facts(queue), as_json)


def watch(url: str, name: str, as_json: bool) -> int:
    """Follow the queue to its end."""
    queue = SharedQueue(url, name)
    queue.check_server()
    found = facts(queue)
    with Display(name, found["total"], Console(stderr=True, highlight=False)) as display:
        while found["state"] == "running":
            progress = Progress(found["total"], found["completed"], found["failed"])
            progress.in_flight = found["in_flight"]
            display.show(progress.snapshot())
            time.sleep(LOOK_EVERY_S)
            found = facts(queue)
    _say(found, as_json)
    return 0 if found["state"] == "finished" and not found["failed"] else 1


def cancel(url: str, name: str, as_json: bool) -> None:
    """No runner begins another line, and the owner ends. Finished records stay in its files."""
    queue = SharedQueue(url, name)
    queue.check_server()
    facts(queue)
    queue.end("cancelled")
    _say(facts(queue), as_json)


def _say(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:12} {value}")
