"""The model that is asked: one that is served, over gRPC."""

from __future__ import annotations

import asyncio
from itertools import takewhile
from typing import Protocol

from tandem.client import TandemClient
from tandem.errors import error_from_reason
from tandem.sampling import SamplingParams

FORCED = 100.0  # of a logit bias: more than any two logits differ


class Model(Protocol):
    """Continues texts, and says how likely a continuation is."""

    async def complete(self, prompt: str, sampling: SamplingParams) -> str: ...

    async def log_likelihood(self, context: str, continuation: str) -> float: ...


class ServedModel:
    """At most `concurrency` requests at once. Raises the service's `TandemError`."""

    def __init__(self, client: TandemClient, concurrency: int) -> None:
        self._client = client
        self._slots = asyncio.Semaphore(concurrency)

    async def complete(self, prompt: str, sampling: SamplingParams) -> str:
        async with self._slots:
            response = await self._client.generate(prompt, sampling)
        return response.completions[0].text

    async def log_likelihood(self, context: str, continuation: str) -> float:
        """Σ log p(token | all before it), natural logarithm, over the tokens that the context has not.

        The service reports log-probabilities of what it generates, before any bias. So each token is made
        the only choice by a bias, and its log-probability is the model's own.
        """
        before, whole = [await self._client.tokenize(text) for text in (context, context + continuation)]
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
        first = max(min(shared, len(whole) - 1), 1)
        return sum([await self._of_token(whole[:place], whole[place]) for place in range(first, len(whole))])

    async def _of_token(self, before: list[int], token: int) -> float:
        sampling = SamplingParams(max_tokens=1, logprobs=0, logit_bias={token: FORCED}, ignore_eos=True)
        async with self._slots:
            completion = (await self._client.generate(before, sampling)).completions[0]
        if list(completion.token_ids) != [token]:
            got = list(completion.token_ids)
            raise error_from_reason(
                "INTERNAL", f"the service chose {got}, though {token} was made its choice"
            )
        return float(completion.logprobs[0].logprob)
