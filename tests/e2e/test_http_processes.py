"""The OpenAI API of a real process tree: the command that starts it, a worker's death, the end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import openai
import pytest

from deploy.embedded import EmbeddedService
from tandem.client import TandemClient
from tandem.sampling import SamplingParams
from tests.checkpoints import tiny_llama
from tests.e2e.harness import config
from tests.web import get

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

LONG = {"max_tokens": 400, "temperature": 1.0, "seed": 4}


async def text_over_http(service, after_chunks=None, do=None):
    """One stream; `do` is done when so many chunks have come."""
    parts = []
    async with openai.AsyncOpenAI(base_url=service.base_url, api_key="none", max_retries=0) as client:
        chunks = await client.completions.create(
            model="", prompt="a story", stream=True, extra_body={"ignore_eos": True}, **LONG
        )
        async for chunk in chunks:
            parts.append(chunk.choices[0].text)
            if len(parts) == after_chunks:
                do()
    assert chunk.choices[0].finish_reason == "length"
    return "".join(parts)


async def test_a_stream_survives_a_worker_and_the_routers_orderly_end():
    async with EmbeddedService(config(router={"http_port": 0})) as service:
        async with TandemClient(service.address) as client:
            wanted = await client.generate("a story", SamplingParams(ignore_eos=True, **LONG))
        text = wanted.completions[0].text
        pids = service.pids()
        assert await text_over_http(service) == text
        assert await text_over_http(service, 50, lambda: os.kill(pids["decode-0"], signal.SIGKILL)) == text
        assert await text_over_http(service, 50, lambda: os.kill(pids["router"], signal.SIGTERM)) == text


async def test_the_command_says_both_addresses_and_ends_on_sigterm():
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.cli", "serve", "--model", str(tiny_llama())),
        *("--port", "0", "--http-port", "0", "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        facts = json.loads(await asyncio.wait_for(process.stdout.readline(), 90))
        async with TandemClient(facts["address"]) as client:
            assert [model.name for model in await client.models()] == [facts["model"]]
        assert (await get(facts["http_address"], "/health")).json() == {"status": "ready"}
    finally:
        process.terminate()
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert facts["address"] in err.decode()
    assert f"http://{facts['http_address']}/v1" in err.decode()
