"""`tandem queue` with --queue redis://…: an owner and a joiner as real processes on one service."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.embedded import EmbeddedService
from tandem.errors import ConfigError
from tests.e2e.harness import config
from tests.e2e.harness import running as running_service
from tests.e2e.test_offline_queue import (
    assert_exactly_once,
    done,
    num_lines,
    queue,
    until_more,
    write_requests,
)
from tests.redis_server import running

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.timeout(300)]

COUNT = 150


def facts(command: str, *arguments: str) -> dict:
    """What a command that only looks says."""
    result = CliRunner().invoke(app, ["queue", command, *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


async def test_two_machines_share_a_queue_whose_owner_is_killed(tmp_path: Path) -> None:
    path, output = write_requests(tmp_path, COUNT, 40), tmp_path / "results.jsonl"
    with running(tmp_path, "--appendonly", "yes") as server:
        shared = ("--queue", server.url, "--name", "both")
        async with running_service(config()) as service:
            where = ("--server", service.address, "--max-in-flight", 4)
            owner = await queue("submit", path, "--output", output, *shared, *where)
            await until_more(output, 0, owner)
            joined = await queue("work", *shared, *where)
            await until_more(output, num_lines(output), owner)
            owner.kill()
            await owner.communicate()
            found = facts("status", *shared)
            assert (found["state"], found["total"]) == ("running", COUNT)

            code, _, err = await done(await queue("resume", path, "--output", output))
            assert code == 0, err
            code, _, err = await done(joined)
            assert code == 0, err
            assert int(err.split(" lines done here")[0].split()[-1]) > 0
        assert_exactly_once(output, COUNT)
        for found in (facts("watch", *shared), facts("status", str(output))):
            assert (found["state"], found["completed"], found["duplicated"]) == ("finished", COUNT, 0)


@pytest.mark.skipif("TANDEM_QUEUE_FAULTS" not in os.environ, reason="minutes: set TANDEM_QUEUE_FAULTS=1")
@pytest.mark.timeout(600)
async def test_router_worker_and_redis_killed_during_a_thousand_lines_cost_none(tmp_path: Path) -> None:
    path, output = write_requests(tmp_path, 1000, 60), tmp_path / "results.jsonl"
    with running(tmp_path, "--appendonly", "yes") as server:
        shared = ("--queue", server.url, "--name", "faults")
        async with EmbeddedService(config(router={"port": free_port()})) as service:
            where = ("--server", service.address, "--max-in-flight", 8)
            owner = await queue("submit", path, "--output", output, *shared, *where)
            await until_more(output, 50, owner)
            joined = await queue("work", *shared, *where)
            for name in ("decode-0", "prefill-0"):
                await until_more(output, num_lines(output) + 50, owner)
                os.kill(service.pids()[name], signal.SIGKILL)
            await until_more(output, num_lines(output) + 50, owner)
            server.kill()
            await asyncio.sleep(1)
            server.start()
            await until_more(output, num_lines(output) + 50, owner)
            os.kill(service.pids()["router"], signal.SIGKILL)
        before = num_lines(output)
        async with EmbeddedService(service.config):
            for process in (owner, joined):
                code, _, err = await done(process)
                assert code == 0, err
    assert before < 1000, "all was done before the router was killed: give it more to do"
    assert_exactly_once(output, 1000)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_what_cannot_work_is_said_at_once(tmp_path: Path) -> None:
    with running(tmp_path, "--appendonly", "yes") as server:
        for arguments, says in (
            (("work", "--queue", server.url, "--name", "none"), "there is no queue none in this Redis"),
            (("status", "--queue", "redis://127.0.0.1:1", "--name", "q"), "cannot use Redis at"),
            (("cancel", "--queue", "http://x", "--name", "q"), "not a Redis URL"),
        ):
            result = CliRunner().invoke(app, ["queue", *arguments])
            assert isinstance(result.exception, ConfigError)
            assert says in str(result.exception)
        unnamed = CliRunner().invoke(app, ["queue", "status", "--queue", server.url])
        assert unnamed.exit_code == 2
