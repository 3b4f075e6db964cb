"""A process that stops its servers says nothing about the calls they had."""

import subprocess
import sys

CHILD = """
import asyncio, sys
import grpc
from tandem import event_loop, rpc

class Lingers:
    def __init__(self, turns):
        self.turns = turns
        self.begun, self.may_end, self.ends = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def call(self, request, context):
        self.begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await self.may_end.wait()
            self.ends.set()
            for _ in range(self.turns):
                await asyncio.sleep(0)

async def main(turns):
    server, servicer = rpc.server(public=False), Lingers(turns)
    handler = grpc.unary_unary_rpc_method_handler(servicer.call, bytes, bytes)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"Call": handler}),))
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    async with rpc.channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/t/Call")(b"")
        await servicer.begun.wait()
        await server.stop(0)
        print(turns, await call.code())
    servicer.may_end.set()
    await servicer.ends.wait()

for turns in range(6):
    (event_loop.run if sys.argv[1] == "ours" else asyncio.run)(main(turns))
"""


def _errors_of(loop: str) -> str:
    done = subprocess.run([sys.executable, "-c", CHILD, loop], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    return done.stderr


def test_handlers_end_before_their_loop_does():
    assert "Traceback" not in _errors_of("ours")


def test_a_loop_of_asyncios_own_may_end_before_them():
    # What `event_loop.run` is for; when gRPC mends it, that can go.
    assert "Traceback" in _errors_of("asyncio")
