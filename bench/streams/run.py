"""What a router process costs with nothing behind it, beside servers of the same stream that route nothing.

Real processes: a router with its gRPC front, null workers of the real protocol, a `grpc.aio` server that
makes a router's calls and nothing else (relay), one that makes none (plain), and this one, which reads the
streams. What is compared is the CPU time of the servers' processes, in turns.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.measure import Meter, Spread, console, flat, machine, table, write_csv, write_json
from bench.streams.clients import Streams
from tandem.config import ClusterConfig

SHORT_TOKENS = 2  # of a request that is counted as one: from either worker one
MOST_MS_PER_REQUEST, MOST_MESSAGE_RATIO = 1.0, 1.3
SETTLE_S = 1.0
BEGIN_S = 60.0  # of tokens more than are watched, for all streams to begin
MOST_STEPS_PER_S = 25.0  # so that these tokens are fewer than a request may ask for
HEADINGS = ("server", "streams", "steps/s", "messages/s", "CPU µs/message", "requests/s", "CPU ms/request")


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of either server."""

    streams: int
    steps_per_s: float
    requests: int  # short ones, `streams` at a time
    seconds: float  # that long streams are watched

    @classmethod
    def of(cls, streams: int) -> Self:
        """As many messages a second as one core is well able to send."""
        steps_per_s = min(max(2000 / streams, 0.5), MOST_STEPS_PER_S)
        return cls(streams, steps_per_s, requests=2 * streams, seconds=8.0)

    @property
    def long_tokens(self) -> int:
        """Of a stream that must not end while it is watched."""
        return int(self.steps_per_s * (self.seconds + BEGIN_S))


@dataclass(frozen=True, slots=True)
class Visit:
    """What one server cost, in CPU time of its process."""

    messages_per_s: float
    us_per_message: float
    requests_per_s: float
    ms_per_request: float


@dataclass(frozen=True, slots=True)
class Server:
    """A running process that streams."""

    address: str
    pid: int

    def cpu_s(self) -> float:
        """What its threads have used so far; not in ticks, of which a few streams take less than one."""
        clock = ctypes.c_int()
        if error := ctypes.CDLL(None).clock_getcpuclockid(self.pid, ctypes.byref(clock)):
            raise OSError(error, os.strerror(error))
        return time.clock_gettime(clock.value)


@contextmanager
def child(*command: str, told: str = "") -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A Python process that is told something, says one JSON line and leaves when its standard input ends."""
    words = [sys.executable, "-m", *command]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(told)
            process.stdin.flush()
            yield process, json.loads(process.stdout.readline())
        finally:
            process.stdin.close()


@contextmanager
def router(load: Load) -> Iterator[Server]:
    """A router with null workers."""
    config = ClusterConfig.from_dict({"router": {"max_queue": 2 * load.streams}})
    text, steps = config.to_json(), str(load.steps_per_s)
    with (
        child("deploy.process", "router", "--worker-id", "router", told=f"{text}\n") as (process, said),
        child("bench.streams.child", "workers", said["internal"], steps, text),
    ):
        yield Server(f"127.0.0.1:{said['port']}", process.pid)
        process.communicate()  # before its workers: whoever is left first complains


@contextmanager
def relay(load: Load) -> Iterator[Server]:
    """The server that makes the same calls to null workers."""
    with (
        child("bench.streams.child", "null", str(load.steps_per_s)) as (_, workers),
        child("bench.streams.child", "relay", f"127.0.0.1:{workers}") as (process, port),
    ):
        yield Server(f"127.0.0.1:{port}", process.pid)


@contextmanager
def plain(load: Load) -> Iterator[Server]:
    """The plain server."""
    with child("bench.streams.child", "plain", str(load.steps_per_s)) as (process, port):
        yield Server(f"127.0.0.1:{port}", process.pid)


async def _timed(server: Server, work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """(wall, CPU) seconds of the server while the work is done."""
    loop = asyncio.get_running_loop()
    began_s, cpu_s = loop.time(), server.cpu_s()
    await work()
    return loop.time() - began_s, server.cpu_s() - cpu_s


async def visit(server: Server, load: Load) -> Visit:
    """Short requests first, then long streams; a few beforehand to warm up."""
    streams = Streams(server.address)
    try:
        await streams.keep(load.streams, load.streams, SHORT_TOKENS)
        wall_s, cpu_s = await _timed(server, lambda: streams.keep(load.streams, load.requests, SHORT_TOKENS))
        requests_per_s, ms_per_request = load.requests / wall_s, 1e3 * cpu_s / load.requests
        return Visit(*await _long(streams, server, load), requests_per_s, ms_per_request)
    finally:
        await streams.close()


async def _long(streams: Streams, server: Server, load: Load) -> tuple[float, float]:
    """Messages per second, and microseconds of CPU for each, while all streams are open and none ends."""
    num_begun = streams.num_begun
    calls = [asyncio.create_task(streams.run(number, load.long_tokens)) for number in range(load.streams)]
    try:
        while streams.num_begun < num_begun + load.streams:
            ended, _ = await asyncio.wait(calls, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
            for call in ended:
                raise call.exception() or RuntimeError("a stream ended before all had begun")
        await asyncio.sleep(SETTLE_S)
        before = streams.num_messages
        wall_s, cpu_s = await _timed(server, lambda: asyncio.sleep(load.seconds))
        num_messages = streams.num_messages - before
    finally:
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
    return num_messages / wall_s, 1e6 * cpu_s / num_messages


def run(load: Load, rounds: int, out: Path, as_json: bool) -> dict[str, Any]:
    """Measure both in turns, print the table, write CSV and JSON; the document that was written."""
    arms = {"router": router, "relay": relay, "plain": plain}
    visits: dict[str, list[Visit]] = {name: [] for name in arms}
    with Meter("streams", rounds * len(arms)) as meter:
        for _ in range(rounds):
            for name, start in arms.items():
                with start(load) as server:
                    visits[name].append(asyncio.run(visit(server, load)))
                meter.step()
    shown = console(as_json)
    title = f"{load.streams} streams at once: median (low…high)"
    shown.print(table(title, HEADINGS, [_cells(name, load, several) for name, several in visits.items()]))
    ratio = Spread.of_ratios(*([v.us_per_message for v in visits[name]] for name in ("router", "plain")))
    request, calls, stream = (Spread.of(v.ms_per_request for v in visits[name]).median for name in arms)
    shown.print(
        f"router / plain per message {ratio.median:.2f} ({ratio.low:.2f}…{ratio.high:.2f}), "
        f"goal ≤ {MOST_MESSAGE_RATIO}; per request {request:.2f} ms, goal ≤ {MOST_MS_PER_REQUEST:g}: "
        f"the client's stream {stream:.2f}, calls to workers {calls - stream:.2f}, "
        f"routing {request - calls:.2f}"
    )
    rows = [{"server": name, **flat(one)} for name, several in visits.items() for one in several]
    content = {"machine": machine(1), "load": flat(load), "rows": rows, "message_ratio": ratio.median}
    write_csv(out / "streams.csv", rows)
    write_json(out / "streams.json", content)
    return content


def _cells(name: str, load: Load, visits: list[Visit]) -> tuple[str, ...]:
    figures = ("messages_per_s", "us_per_message", "requests_per_s", "ms_per_request")
    spreads = [Spread.of(getattr(one, figure) for one in visits) for figure in figures]
    texts = [f"{s.median:.4g} ({s.low:.4g}…{s.high:.4g})" for s in spreads]
    return (name, str(load.streams), f"{load.steps_per_s:g}", *texts)
