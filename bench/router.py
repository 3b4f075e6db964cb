"""The router's admission, queue and policy on a virtual clock: `tandem bench router`.

Nothing is computed and nobody waits: arrivals, prefills and decodes are events of a simulated time, so what
is measured is the router's own work. A request arrives (put), is admitted when a pair has room (get, credits
on three books), gives back its prefill after some time and the rest after some more.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.measure import Meter, console, flat, machine, table, write_csv, write_json
from router.admission import Admission, Plan
from router.needs import Needs
from router.policy import POLICIES, Route
from router.prefix_map import PrefixMap
from router.queue import RequestQueue
from router.registry import WorkerInfo, WorkerRole
from router.size_bucket import Entry
from tandem.errors import Overloaded

BLOCK_SIZE, BLOCK_BYTES, WORKER_BLOCKS = 16, 1 << 20, 512
PREFILL_TOKENS_PER_S, DECODE_TOKENS_PER_S = 8000.0, 50.0  # of a worker, of a sequence
LOADS = (0.7, 1.2)  # offered over what the workers' memory can hold at once
QUEUE_LENGTHS = (100, 1_000, 10_000, 100_000)
SWEEP = 2_000  # operations on a queue of each length
TRACED = 20_000  # requests of the run whose memory is traced
SESSIONS = 4_000  # the prompts of each are beginnings of one text
MAX_PROMPT = 768  # tokens
PIECE_TOKENS = 128  # of a cached prefix
HEADINGS = (
    "policy",
    "workers",
    "load",
    "requests",
    "refused",
    "admitted/s",
    "µs/request",
    "most waiting",
    "same worker",
    "MB",
    "left over",
)


@dataclass(frozen=True, slots=True)
class Simulated:
    """One run. Seconds are of this machine, not of the simulation."""

    policy: str
    workers: int
    load: float
    requests: int
    admitted: int
    refused: int  # by a full queue
    decisions_per_s: float  # put, attempts to admit, releases: everything that a request costs
    microseconds_per_request: float
    most_waiting: int
    same_worker: float  # share of requests decoded where the one before of their session was
    memory_mb: float  # most that the objects held
    owned_at_the_end: int  # units on all books; anything but 0 is a leak


@dataclass(frozen=True, slots=True)
class QueueCost:
    """A put and a get on a queue of a given length."""

    length: int
    microseconds: float


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the queue sees it."""

    request_id: str
    needs: Needs
    output_tokens: int
    session: str = ""
    beginnings: tuple[bytes, ...] = ()
    tenant: str = ""
    priority: int = 0
    deadline_s: float = float("inf")


class Simulation:
    """Events in order of simulated time."""

    def __init__(self, policy: str, workers: int, load: float, requests: int, seed: int = 0) -> None:
        self._now_s = 0.0
        self._random = random.Random(seed)
        self._admission = Admission(POLICIES[policy](), clock=lambda: self._now_s)
        self._prefixes = PrefixMap(PIECE_TOKENS) if policy == "kv-aware" else None
        self._homes: dict[str, str] = {}  # where each session was decoded last
        half = workers // 2
        for number in range(half):
            for role in WorkerRole:
                self._admission.add_worker(_worker(f"{role.name.lower()}-{number}", role))
        self._admission.set_store(1 << 50)
        self._queue: RequestQueue[Job] = RequestQueue(10_000, 5.0, clock=lambda: self._now_s)
        mean_s = half * WORKER_BLOCKS * BLOCK_SIZE / 640  # sequences of a mean length that fit at once
        self._rate = load * mean_s / (256 / DECODE_TOKENS_PER_S)
        self._left = requests
        self._events: list[tuple[float, int, str, Any]] = []
        self._numbers = itertools.count()
        self.admitted = self.refused = self.most_waiting = self.returned = 0

    def run(self, meter: Meter) -> None:
        """Until the last request has ended."""
        self._at(0.0, "arrive", None)
        while self._events:
            self._now_s, _, what, plan = heapq.heappop(self._events)
            if what == "arrive":
                self._arrive(meter)
            elif what == "prefilled":
                self._admission.release_prefill(plan)
                self._admission.release_store(plan)
            else:
                self._admission.release_all(plan)
            while self._queue.constrained_get(self._try_admit) is not None:
                pass
            self.most_waiting = max(self.most_waiting, len(self._queue))

    def owned(self) -> int:
        return sum(audit.owned for audit in self._admission.audit())

    def _arrive(self, meter: Meter) -> None:
        self._left -= 1
        if self._left > 0:
            self._at(self._random.expovariate(self._rate), "arrive", None)
        if self._left % 1000 == 0:
            meter.step()
        prompt, output = self._random.randint(1, MAX_PROMPT), self._random.randint(1, 512)
        job = replace(_job(f"r{self._left}", prompt, output), **self._traits(prompt))
        try:
            self._queue.put(job, _blocks(prompt + output))
        except Overloaded:
            self.refused += 1

    def _try_admit(self, entry: Entry[Job]) -> bool:
        job = entry.request
        cached = self._prefixes.cached_tokens(job.beginnings) if self._prefixes is not None else {}
        route = Route(job.request_id, job.session, cached)
        plan = self._admission.try_admit(job.request_id, 1, job.needs, route=route)
        if plan is None:
            return False
        if self._prefixes is not None:
            self._prefixes.note(job.beginnings, plan.decode.worker_id)
        self.admitted += 1
        self.returned += self._homes.get(job.session) == plan.decode.worker_id
        self._homes[job.session] = plan.decode.worker_id
        prefill_s = job.needs.prefill_tokens / PREFILL_TOKENS_PER_S
        self._at(prefill_s, "prefilled", plan)
        self._at(prefill_s + job.output_tokens / DECODE_TOKENS_PER_S, "ended", plan)
        return True

    def _traits(self, prompt: int) -> dict[str, Any]:
        """A session, and the names of the prompt's beginnings where the policy asks for them."""
        session = self._random.randrange(SESSIONS)
        if self._prefixes is None:
            return {"session": str(session)}
        tokens = range(session * MAX_PROMPT, session * MAX_PROMPT + prompt)
        return {"session": str(session), "beginnings": self._prefixes.beginnings("", tokens)}

    def _at(self, delay_s: float, what: str, plan: Plan | None) -> None:
        heapq.heappush(self._events, (self._now_s + delay_s, next(self._numbers), what, plan))


def _worker(worker_id: str, role: WorkerRole) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        incarnation="1",
        role=role,
        address="",
        fingerprint=bytes(32),
        block_size=BLOCK_SIZE,
        num_blocks=WORKER_BLOCKS,
        block_bytes=BLOCK_BYTES,
    )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def _job(request_id: str, prompt: int, output: int) -> Job:
    prefill, decode = _blocks(prompt), _blocks(prompt + output)
    needs = Needs(prompt + output, decode, decode * BLOCK_BYTES, prefill * BLOCK_BYTES, prefill, prompt)
    return Job(request_id, needs, output)


def simulate(policy: str, workers: int, load: float, requests: int, meter: Meter) -> Simulated:
    """One run, then a short one for its memory: tracing it takes time."""
    simulation = Simulation(policy, workers, load, requests)
    began_s = time.perf_counter()
    simulation.run(meter)
    seconds = time.perf_counter() - began_s
    tracemalloc.start()
    Simulation(policy, workers, load, min(requests, TRACED)).run(meter)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Simulated(
        policy,
        workers,
        load,
        requests,
        simulation.admitted,
        simulation.refused,
        simulation.admitted / seconds,
        1e6 * seconds / requests,
        simulation.most_waiting,
        simulation.returned / max(simulation.admitted, 1),
        peak / 1e6,
        simulation.owned(),
    )


def queue_costs() -> Iterator[QueueCost]:
    """A put and a get behind queues of growing length, none of which the last get drains."""
    for length in QUEUE_LENGTHS:
        queue: RequestQueue[Job] = RequestQueue(length + SWEEP + 1, 5.0, clock=lambda: 0.0)
        numbers = random.Random(length)
        for number in range(length):
            queue.put(_job(f"w{number}", 16, 16), numbers.randint(1, 4096))
        began_s = time.perf_counter()
        for number in range(SWEEP):
            queue.put(_job(f"n{number}", 16, 16), numbers.randint(1, 4096))
            queue.constrained_get(lambda entry: True)
        yield QueueCost(length, 1e6 * (time.perf_counter() - began_s) / SWEEP)


def _cells(row: Simulated) -> tuple[str, ...]:
    return (
        row.policy,
        str(row.workers),
        f"{row.load:g}",
        str(row.requests),
        str(row.refused),
        f"{row.decisions_per_s:.0f}",
        f"{row.microseconds_per_request:.0f}",
        str(row.most_waiting),
        f"{row.same_worker:.0%}",
        f"{row.memory_mb:.0f}",
        str(row.owned_at_the_end),
    )


def run(workers: int, requests: int, out: Path, as_json: bool) -> dict[str, Any]:
    """Simulate, print the tables, write CSV and JSON; the document that was written."""
    shown = console(as_json)
    runs = [(policy, load) for policy in POLICIES for load in LOADS]
    with Meter("router", 1 + len(runs) * (requests + min(requests, TRACED)) // 1000) as meter:
        rows = [simulate(policy, workers, load, requests, meter) for policy, load in runs]
    costs = list(queue_costs())
    shown.print(table("the router on a virtual clock", HEADINGS, map(_cells, rows)))
    waiting = ((str(cost.length), f"{cost.microseconds:.1f}") for cost in costs)
    shown.print(table("a put and a get, by queue length", ("waiting", "µs"), waiting))
    content = {
        "machine": machine(1),
        "simulated": [flat(row) for row in rows],
        "queue": [flat(cost) for cost in costs],
    }
    write_csv(out / "router.csv", [flat(row) for row in rows])
    write_json(out / "router.json", content)
    return content
