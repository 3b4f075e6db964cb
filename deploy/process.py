"""One process of the embedded service: the router with its store, a prefill worker, or a decode worker.

    python -m deploy.process router|prefill|decode --worker-id NAME

The first line of standard input is the settings as JSON: they may hold a password, and everybody on the
machine can read a command line. The process says where it listens, or why it cannot run, in one JSON line on
standard output. A worker learns the router's address from the second line of standard input, so that it can
load its model meanwhile. When standard input ends, or on SIGTERM, the process leaves in order: nobody
outlives the one who started it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import threading
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from tandem import event_loop, log
from tandem.allocator import keep_objects, keep_pages
from tandem.config import ClusterConfig
from tandem.errors import ConfigError

if TYPE_CHECKING:
    from decode_worker.server import DecodeServer
    from prefill_worker.server import PrefillServer

EXIT_CONFIG = 2


async def run_router(config: ClusterConfig, leave: asyncio.Event) -> None:
    from deploy.http import HttpFront
    from deploy.store import EmbeddedStore, leave_process
    from router.server import Router

    store, router, http = EmbeddedStore(config, leave_process), Router(config), HttpFront(config)
    await store.start()
    await router.start(add_services=[store.add_to], audits=store.audits, collectors=[store.metrics()])
    await store.announce(router.internal_address)
    await http.start(router)
    keep_objects()
    _say(port=router.port, http_port=http.port, internal=router.internal_address)
    await leave.wait()
    await router.stop()
    await http.stop()
    await router.close()
    await store.stop()


async def run_worker(
    role: str, config: ClusterConfig, leave: asyncio.Event, worker_id: str, router: Awaitable[str]
) -> None:
    server: PrefillServer | DecodeServer
    if config.profile.dir is not None:
        from tandem.engine.profiler import prepare

        prepare()
    if role == "prefill":
        from prefill_worker.server import PrefillServer

        server = await PrefillServer.start(config, worker_id, router)
    else:
        from decode_worker.server import DecodeServer

        server = await DecodeServer.start(config, worker_id, router)
    keep_objects()
    _say(kernels=server.kernels)
    await leave.wait()
    await server.stop()


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


class _StandardInput:
    """Its next line as a future, its end as an event. Read by a daemon thread, as it blocks."""

    def __init__(self, leave: asyncio.Event) -> None:
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self.next_line: asyncio.Future[str] = self._loop.create_future()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self._loop.call_soon_threadsafe(self._take, line.strip())
        self._loop.call_soon_threadsafe(self._leave.set)

    def _take(self, line: str) -> None:
        if not self.next_line.done():
            self.next_line.set_result(line)


async def _main(role: str, config: ClusterConfig, worker_id: str) -> None:
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, leave.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C reaches the whole group; the parent decides
    standard_input = _StandardInput(leave)
    if role == "router":
        await run_router(config, leave)
        return
    work = asyncio.create_task(run_worker(role, config, leave, worker_id, standard_input.next_line))
    left = asyncio.create_task(leave.wait())
    await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
    if not standard_input.next_line.done():  # told to leave before the router's address was known
        work.cancel()
    await asyncio.wait({work})
    left.cancel()
    if not work.cancelled():
        work.result()


def main() -> None:
    """Entry point of a child process."""
    parser = argparse.ArgumentParser(prog="deploy.process")
    parser.add_argument("role", choices=("router", "prefill", "decode"))
    parser.add_argument("--worker-id", default="")
    parser.add_argument("--log-level", default="WARNING")
    options = parser.parse_args()
    settings = sys.stdin.readline()
    if not settings:  # whoever started it has gone
        return
    log.set_up(options.worker_id or options.role, options.log_level)
    keep_pages()
    try:
        config = ClusterConfig.from_json(settings)
        event_loop.run(_main(options.role, config, options.worker_id))
    except ConfigError as error:
        _say(error=str(error))  # whoever started the processes tells it once
        sys.exit(EXIT_CONFIG)


if __name__ == "__main__":
    main()
