"""The mix: short requests of every kind. What a request is follows from its number alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from random import Random

from tandem.client import TandemClient
from tandem.errors import DeadlineExceeded, TandemError
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, SpeculationPolicy

CONCURRENCY = 8
MAX_PROMPT, MAX_TOKENS = 48, 24
MAX_TOKEN_ID = 250
SPECIAL = 8  # ids below this are not text in every vocabulary
TIMEOUT_S = 60.0  # of those that are not meant to be late
WORDS = ("def ", "return", "import os\n", "class A:", "for i in range(3):\n    print(i)\n", "é", "x = ")
ENDED, CANCELLED, LATE, FAILED = "ended", "cancelled", "late", "failed"


class Load:
    """Sends requests by number, and counts kinds and outcomes."""

    def __init__(self, client: TandemClient) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (kind, outcome)
        self.failures: list[str] = []
        self._client = client
        self._kinds: tuple[tuple[str, Callable[[Random], Awaitable[str]]], ...] = (
            ("stream", self._stream),
            ("sampled", self._sampled),
            ("several", self._several),
            ("speculated", self._speculated),
            ("stopped", self._stopped),
            ("cancelled", self._cancelled),
            ("late", self._late),
        )

    async def run(self, numbers: Iterable[int]) -> None:
        """All of them, some at a time; returns when the last has ended."""
        waiting = iter(numbers)

        async def work() -> None:
            for number in waiting:
                await self._one(number)

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))

    async def _one(self, number: int) -> None:
        kind, send = self._kinds[number % len(self._kinds)]
        try:
            outcome = await send(Random(number))
        except TandemError as error:
            outcome = FAILED
            self.failures.append(f"request {number} ({kind}): {error}")
        self.outcomes[kind, outcome] += 1

    async def _stream(self, random: Random) -> str:
        return await self._follow(random, SamplingParams(max_tokens=_tokens(random)))

    async def _sampled(self, random: Random) -> str:
        sampling = SamplingParams(
            max_tokens=_tokens(random),
            temperature=random.uniform(0.2, 1.5),
            top_p=random.uniform(0.5, 1.0),
            top_k=random.choice((0, 5, 50)),
            repetition_penalty=random.choice((1.0, 1.2)),
            logprobs=random.choice((None, 0, 3)),
            seed=random.randrange(1 << 20),
        )
        return await self._follow(random, sampling)

    async def _several(self, random: Random) -> str:
        count = random.randint(2, 4)
        sampling = SamplingParams(n=count, temperature=1.0, seed=1, max_tokens=_tokens(random))
        await self._client.generate(_prompt(random), sampling, timeout_s=TIMEOUT_S)
        return ENDED

    async def _speculated(self, random: Random) -> str:
        speculation = SpeculationParams(
            policy=random.choice(tuple(SpeculationPolicy)), num_assistant_tokens=random.randint(1, 7)
        )
        sampling = SamplingParams(
            max_tokens=_tokens(random), temperature=random.choice((0.0, 0.8)), seed=random.randrange(1 << 20)
        )
        return await self._follow(random, sampling, speculation)

    async def _stopped(self, random: Random) -> str:
        sampling = SamplingParams(max_tokens=_tokens(random), stop=(random.choice(("\n", "(", "e")),))
        prompt = "".join(random.choices(WORDS, k=random.randint(1, 6)))
        await self._client.generate(prompt, sampling, timeout_s=TIMEOUT_S)
        return ENDED

    async def _cancelled(self, random: Random) -> str:
        """Leaves after some events."""
        sampling = SamplingParams(max_tokens=4 * MAX_TOKENS, ignore_eos=True)
        left = random.randint(0, 10)
        async with aclosing(self._client.stream(_prompt(random), sampling, timeout_s=TIMEOUT_S)) as events:
            async for _ in events:
                if not left:
                    return CANCELLED
                left -= 1
        return ENDED

    async def _late(self, random: Random) -> str:
        """Has a deadline that may pass anywhere between its arrival and its end."""
        sampling = SamplingParams(max_tokens=4 * MAX_TOKENS, ignore_eos=True)
        try:
            await self._client.generate(_prompt(random), sampling, timeout_s=random.uniform(0.002, 0.3))
        except DeadlineExceeded:
            return LATE
        return ENDED

    async def _follow(
        self, random: Random, sampling: SamplingParams, speculation: SpeculationParams | None = None
    ) -> str:
        events = self._client.stream(_prompt(random), sampling, speculation=speculation, timeout_s=TIMEOUT_S)
        async with aclosing(events):
            async for _ in events:
                pass
        return ENDED


def _tokens(random: Random) -> int:
    return random.randint(1, MAX_TOKENS)


def _prompt(random: Random) -> list[int]:
    return [random.randrange(SPECIAL, MAX_TOKEN_ID) for _ in range(random.randint(1, MAX_PROMPT))]
