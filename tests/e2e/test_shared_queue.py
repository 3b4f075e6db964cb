"""`tandem queue` with --queue redis://…: an owner and a joiner as real processes on one service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
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
