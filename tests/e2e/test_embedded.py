"""The process tree: it serves, mends itself, ends together, and says plainly when it cannot run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from deploy.embedded import MAX_RESTARTS, EmbeddedService
from tandem.audit import fetch_audit
from tandem.client import TandemClient
from tandem.config import ModelConfig
from tandem.cores import usable_cores
from tandem.errors import ConfigError, StreamBroken, TandemError, Unavailable
from tandem.rpc import channel
from tandem.sampling import SamplingParams
from tests.checkpoints import tiny_llama
from tests.e2e.harness import Result, config, until
from tests.web import get

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

LONG = SamplingParams(max_tokens=400, ignore_eos=True, temperature=1.0, seed=4)
PARENT = """
import asyncio, json, sys
from deploy.embedded import EmbeddedService
from tandem.config import ClusterConfig

async def main():
    async with EmbeddedService(ClusterConfig.from_json(sys.argv[1])) as service:
        print(json.dumps(service.pids()), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def broken_model(tmp_path, missing):
    """The checkpoint without one of its files."""
    path = tmp_path / "broken"
    shutil.copytree(tiny_llama(), path)
    (path / missing).unlink()
    return replace(config(), model=ModelConfig(path=path))


async def collect(address, sampling, after_tokens=None, do=None, resume_s=0.0):
    """One stream; `do` is done when so many tokens have come."""
    result = Result()
    async with TandemClient(address) as client:
        async for event in client.stream("a story", sampling, timeout_s=60, resume_s=resume_s):
            result.take(event)
            if do is not None and len(result.token_ids) >= after_tokens:
                do, act = None, do
                act()
    return result


async def audit(service):
    async with channel(service.internal_address) as internal:
        return await fetch_audit(internal)


async def nothing_is_held(service):
    async with asyncio.timeout(30):
        while not all(pool.is_empty for pool in await audit(service)):  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.05)


async def test_it_serves_mends_itself_and_leaves_no_process_behind():
    """B2 with SIGKILL: the stream goes on where it was on the worker that was started again."""
    said = []
    async with EmbeddedService(config(), on_event=said.append) as service:
        pids = service.pids()
        assert set(pids) == {"router", "prefill-0", "decode-0"}
        assert service.kernels.keys() == {"prefill-0", "decode-0"}
        assert all(kernels.startswith(("native (", "lean (")) for kernels in service.kernels.values())
        wanted = await collect(service.address, LONG)
        result = await collect(service.address, LONG, 100, lambda: os.kill(pids["decode-0"], signal.SIGKILL))

        assert result.token_ids == wanted.token_ids
        assert result.text == wanted.text
        assert len(result.admitted) == 2
        assert said == ["decode-0 ended with exit code -9; starting it again"]

        os.kill(pids["prefill-0"], signal.SIGKILL)
        again = await collect(service.address, LONG)
        assert again.token_ids == wanted.token_ids
        await nothing_is_held(service)
        pids |= service.pids()
        everybody = {*pids.values(), *service.pids().values()}

    await until(lambda: not any(map(is_alive, everybody)))


@pytest.mark.slow
async def test_a_router_that_is_told_to_end_lets_its_streams_finish():
    """O2 and the service's own words for it."""
    async with EmbeddedService(config()) as service:
        wanted = await collect(service.address, LONG)
        result = await collect(
            service.address, LONG, 50, lambda: os.kill(service.pids()["router"], signal.SIGTERM)
        )
        with pytest.raises(Unavailable, match="the router ended with exit code 0"):
            await asyncio.wait_for(service.while_healthy(asyncio.Event().wait()), 20)

    assert result.token_ids == wanted.token_ids


@pytest.mark.slow
async def test_a_router_that_is_killed_ends_streams_at_the_client():
    """O1."""
    async with EmbeddedService(config()) as service:
        with pytest.raises(TandemError) as raised:
            await collect(
                service.address, LONG, 50, lambda: os.kill(service.pids()["router"], signal.SIGKILL)
            )
        with pytest.raises(Unavailable, match="the router ended with exit code -9"):
            await asyncio.wait_for(service.while_healthy(asyncio.Event().wait()), 20)
        pids = service.pids()

    assert isinstance(raised.value, (Unavailable, StreamBroken))
    await until(lambda: not any(map(is_alive, pids.values())))


async def test_a_worker_has_all_cores_while_the_other_waits():
    """Prefill and decode of one request take turns; a worker that was killed takes nothing with it."""
    wanted = len(usable_cores()) or 1
    async with EmbeddedService(config(router={"http_port": 0})) as service:
        cores = await cores_after(service, SamplingParams(max_tokens=20))
        assert cores == {"prefill-0": wanted, "decode-0": wanted}
        kill = partial(os.kill, service.pids()["prefill-0"], signal.SIGKILL)
        assert (await collect(service.address, LONG, 10, kill)).finished
        assert (await cores_after(service, LONG))["decode-0"] == wanted
    own = config(router={"http_port": 0}, decode={"threads": 1})
    async with EmbeddedService(own) as service:
        assert await cores_after(service, LONG) == {"prefill-0": 1, "decode-0": 1}


async def cores_after(service, sampling):
    """That computed the last steps of a request, as the workers' next heartbeats say."""
    await collect(service.address, sampling)
    await asyncio.sleep(2 * service.config.router.heartbeat_s)
    text = (await get(service.http_address, "/metrics")).body.decode()
    found = re.findall(r'tandem_worker_cores{role="\w+",worker="([-\w]+)"} (\d+)', text)
    return {name: int(count) for name, count in found}


async def test_nobody_outlives_a_parent_that_is_killed():
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, config().to_json()), stdout=asyncio.subprocess.PIPE
    )
    try:
        pids = json.loads(await asyncio.wait_for(parent.stdout.readline(), 90))
        assert all(map(is_alive, pids.values()))
    finally:
        parent.kill()
        await parent.wait()

    await until(lambda: not any(map(is_alive, pids.values())))


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json"])
async def test_a_setting_that_cannot_work_ends_the_start_with_one_clear_error(tmp_path, capfd, missing):
    began_s = time.monotonic()
    service = EmbeddedService(broken_model(tmp_path, missing))
    with pytest.raises(ConfigError) as raised:
        await service.__aenter__()
    pids = service.pids()
    said = capfd.readouterr()

    assert time.monotonic() - began_s < 60
    assert not any(map(is_alive, pids.values()))
    assert missing.removeprefix("model") in str(raised.value)
    assert "Traceback" not in said.err + said.out
    assert "error" not in said.err + said.out


async def test_what_only_a_worker_can_know_ends_the_start_too():
    with pytest.raises(ConfigError, match="100 bytes of KV cache hold no block of 8192 bytes"):
        await EmbeddedService(config(cache={"decode_bytes": 100})).__aenter__()


async def test_the_command_says_what_is_wrong_in_one_line_and_exits_with_2(tmp_path):
    model = broken_model(tmp_path, "model.safetensors").model.path
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from deploy.cli import main; main()"),
        *("serve", "--model", str(model), "--port", "0", "--http-port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(command.communicate(), 90)
    lines = [line for line in err.decode().splitlines() if line.startswith("error:")]

    assert command.returncode == 2, err
    assert out == b""
    assert "Traceback" not in err.decode()
    assert "Warning" not in err.decode()
    assert sum("no .safetensors" in line for line in lines) == 1, lines


@pytest.mark.slow
async def test_a_worker_that_crashes_all_the_time_ends_the_service():
    async with EmbeddedService(config()) as service:
        failing = asyncio.create_task(service.while_healthy(asyncio.Event().wait()))
        killed = set()
        async with asyncio.timeout(60):
            while not failing.done():
                pid = service.pids()["prefill-0"]
                if pid not in killed and is_alive(pid):
                    killed.add(pid)
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.02)
        with pytest.raises(ConfigError, match=r"prefill-0 cannot run \(exit code -9\)"):
            await failing

    assert len(killed) == MAX_RESTARTS + 1
