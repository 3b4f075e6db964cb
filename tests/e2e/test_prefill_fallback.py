"""Every prefill process is killed: prompts are computed where they are decoded until one is back."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from deploy.embedded import EmbeddedService
from tandem.client import TandemClient
from tandem.sampling import SamplingParams
from tests.e2e.harness import Result, config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, seed=4)


async def say(address: str, prompt: str) -> Result:
    result = Result()
    async with TandemClient(address) as client:
        async for event in client.stream(prompt, PARAMS, timeout_s=30):
            result.take(event)
    assert result.finished is not None
    return result


def placement(result: Result) -> str:
    return result.finished.timings.placement


async def test_prompts_go_on_while_all_prefill_processes_are_gone():
    prompts = ["a story", "x" * 300]
    async with EmbeddedService(config(), num_prefill=2) as service:
        wanted = [await say(service.address, prompt) for prompt in prompts]
        assert {placement(result) for result in wanted} == {"split/always"}
        for name in ("prefill-0", "prefill-1"):
            os.kill(service.pids()[name], signal.SIGSTOP)  # neither answers nor is started again
        found = [await say(service.address, prompt) for prompt in prompts]
        assert placement(found[-1]) == "local/no-prefill"
        assert [result.token_ids for result in found] == [result.token_ids for result in wanted]
        assert found[-1].admitted[-1].prefill_worker == ""

        for name in ("prefill-0", "prefill-1"):
            os.kill(service.pids()[name], signal.SIGKILL)
        async with asyncio.timeout(60):
            while placement(result := await say(service.address, prompts[1])) != "split/always":
                assert result.token_ids == wanted[1].token_ids
        assert result.token_ids == wanted[1].token_ids
