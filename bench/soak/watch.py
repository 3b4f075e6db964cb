"""What a soak looks at from outside: memory of the service's processes, its decode step, its books.

The step is that of a service beside a fresh one's, in turns: a machine that others use is faster and slower
by more within a soak than a worker could become.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from pathlib import Path

from bench.measure import Spread
from tandem.audit import fetch_audit, fetch_audit_and_workers
from tandem.client import TandemClient
from tandem.ledger import PoolAudit
from tandem.pb.v1 import generation_pb2 as pb
from tandem.rpc import channel
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, SpeculationPolicy

PROBES, PROBE_TOKENS = 16, 48
ROUNDS = 60  # of probes of two services in turns: 12 s with the bundled model
PROBE_PROMPT = tuple(range(20, 52))
UNTIMED_TOKENS = 2  # of an output: `decode_ms` begins at the second
SETTLE_S = 10.0  # that what was cancelled last may take to be given back
LOOK_EVERY_S = 0.1
PAGE = os.sysconf("SC_PAGE_SIZE")


def processes(pid: int) -> dict[str, int]:
    """Process ids of a service by worker id; `supervisor` is the one that started the others."""
    found = {"supervisor": pid}
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            if "--worker-id" in words:
                found[words[words.index("--worker-id") + 1]] = int(child)
    return found


def resident_bytes(pid: int) -> int:
    """Memory of a process that lies in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


async def decode_step_s(client: TandemClient) -> float:
    """Seconds of a plain decode step of one sequence: the fastest of some probes."""
    return min([await _probe(client) for _ in range(PROBES)])


async def steps_in_turns(tired: TandemClient, fresh: TandemClient) -> Spread:
    """Decode steps of one service over another's within rounds of a probe each, either first in turn."""
    steps: dict[TandemClient, list[float]] = {tired: [], fresh: []}
    for number in range(ROUNDS):
        for client in (tired, fresh) if number % 2 == 0 else (fresh, tired):
            steps[client].append(await _probe(client))
    return Spread.of_ratios(steps[tired], steps[fresh])


async def _probe(client: TandemClient) -> float:
    sampling = SamplingParams(max_tokens=PROBE_TOKENS, ignore_eos=True)
    plain = SpeculationParams(policy=SpeculationPolicy.OFF)
    finished = pb.Finished()
    async with aclosing(client.stream(PROBE_PROMPT, sampling, speculation=plain)) as events:
        async for event in events:
            if event.WhichOneof("event") == "finished":
                finished = event.finished
    return finished.timings.decode_ms / 1e3 / (PROBE_TOKENS - UNTIMED_TOKENS)


async def still_owned(internal_address: str) -> list[str]:
    """Pools of any process that are not empty, once there was time to give everything back."""
    for _ in range(int(SETTLE_S / LOOK_EVERY_S)):
        owned = [
            f"{audit.pool}: {audit.owned} {audit.unit} of {len(audit.owners)} owners"
            for audit in await _audits(internal_address)
            if not audit.is_empty
        ]
        if not owned:
            return []
        await asyncio.sleep(LOOK_EVERY_S)
    return owned


async def _audits(internal_address: str) -> list[PoolAudit]:
    async with channel(internal_address) as router:
        audits, workers = await fetch_audit_and_workers(router)
    for address in workers:
        async with channel(address) as worker:
            audits += await fetch_audit(worker)
    return audits
