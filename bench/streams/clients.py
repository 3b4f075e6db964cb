"""Many streams at once to one address, read as bytes: only arrivals are counted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from tandem.pb.v1 import generation_pb2 as pb
from tandem.rpc import channel

METHOD = "/tandem.v1.GenerationService/StreamGenerate"
CHANNELS = 8
PROMPT_TOKENS = 32


class Streams:
    """Counts messages and ended streams of all connections to `address`."""

    def __init__(self, address: str) -> None:
        self._channels = [channel(address) for _ in range(CHANNELS)]
        self._calls: Sequence[Any] = [
            one.unary_stream(METHOD, request_serializer=None, response_deserializer=None)
            for one in self._channels
        ]
        self.num_messages = 0
        self.num_begun = 0  # streams that brought something
        self.num_ended = 0

    async def run(self, number: int, max_tokens: int) -> None:
        """One request to its end. Raises `AioRpcError`."""
        message = pb.GenerationInput(
            token_ids=pb.TokenIds(ids=[(number * 31 + place) % 997 + 1 for place in range(PROMPT_TOKENS)]),
            sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        )
        body = pb.StreamGenerateRequest(input=message).SerializeToString()
        is_new = True
        async for _ in self._calls[number % CHANNELS](body):
            self.num_messages += 1
            self.num_begun += is_new
            is_new = False
        self.num_ended += 1

    async def keep(self, concurrent: int, total: int, max_tokens: int) -> None:
        """`total` requests, `concurrent` at any time."""
        numbers = iter(range(total))

        async def caller() -> None:
            for number in numbers:
                await self.run(number, max_tokens)

        async with asyncio.TaskGroup() as callers:
            for _ in range(concurrent):
                callers.create_task(caller())

    async def close(self) -> None:
        await asyncio.gather(*(one.close() for one in self._channels))
