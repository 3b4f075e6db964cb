"""A host without memory refuses the reservation; the store lives and serves what it has."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from kvstore.backends.memory import MemoryBackend
from kvstore.key import ObjectKey

# A store and its client in a process that may get 512 MiB more than it has by then; the budget is 4 GiB.
SCRIPT = """
import asyncio, resource
from pathlib import Path
from tandem.errors import Overloaded
from tests.kvstore.test_service import MIB, PAYLOAD, big, put, serving

def used() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

async def main():
    async with serving(4096 * MIB) as service, service.client() as client:
        await client.release(await put(client, big(4)))
        resource.setrlimit(resource.RLIMIT_AS, (used() + 512 * MIB,) * 2)
        handles = []
        try:
            for number in range(60):
                handles.append(await put(client, big(32, number)))
        except Overloaded as error:
            assert error.reason == "NO_MEMORY_FIT_NOW", error
        kept = [sum([len(payload) async for _, payload in client.get(each, "r")]) for each in handles]
        assert kept == [32 * MIB] * len(handles)
        while handles:
            await client.release(handles.pop())
        handles.append(await put(client, big(32, 99)))
        assert service.store.audit().owned == 32 * MIB
        print(len(kept))
asyncio.run(main())
"""


def test_a_process_that_gets_no_more_memory_refuses_and_lives():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert 2 <= int(done.stdout) < 16


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["place", "put", "delete"])), max_size=40))
def test_what_is_promised_is_what_has_not_come(steps):
    backend, expected = MemoryBackend(), {}
    for number, step in steps:
        key = ObjectKey(bytes([number]) * 16, 0)
        if step == "place":
            backend.delete(key)
            backend.place(key, 100)
            expected[key] = 100
        elif step == "put":
            backend.put(key, len(backend._messages.get(key, ())), bytes(30))
            expected[key] = max(0, expected.get(key, 0) - 30)
        else:
            backend.delete(key)
            expected.pop(key, None)
        assert backend._num_promised == sum(expected.values())
