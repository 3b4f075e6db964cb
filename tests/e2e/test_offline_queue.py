"""`tandem queue` as real processes: whatever is killed, every line ends with exactly one record."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from deploy.cli import app
from deploy.embedded import EmbeddedService
from tandem.client import TandemClient
from tandem.config import SecurityConfig
from tandem.errors import ConfigError
from tandem.offline.results import error_path
from tandem.sampling import SamplingParams
from tests.checkpoints import tiny_llama
from tests.e2e.harness import config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PATIENCE_S = 100.0
RESUME_S = 2.0  # until work goes on after a crash


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service():
    """For tests that end runners only."""
    async with EmbeddedService(config()) as started:
        yield started


def write_requests(folder: Path, count: int, max_tokens: int = 24) -> Path:
    path = folder / "requests.jsonl"
    with path.open("w") as file:
        for number in range(count):
            body = {
                "prompt": f"story {number}",
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            line = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


async def queue(*arguments: object) -> Process:
    command = [sys.executable, "-m", "deploy.cli", "queue", *map(str, arguments)]
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)


async def done(process: Process) -> tuple[int, str, str]:
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert "Traceback" not in err.decode(), err.decode()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def facts(output: Path) -> dict:
    code, out, _ = await done(await queue("status", "--output", output, "--json"))
    assert code == 0
    return dict(json.loads(out))


def records(output: Path) -> list[dict]:
    paths = [path for path in (output, error_path(output)) if path.exists()]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def num_lines(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (output, error_path(output)) if path.exists())


async def until_more(output: Path, than: int, process: Process) -> tuple[float, float]:
    """(wall, CPU) seconds until the process has added a record."""
    began_s, cpu_s = time.monotonic(), 0.0
    while num_lines(output) <= than and process.returncode is None:
        assert time.monotonic() - began_s < PATIENCE_S
        await asyncio.sleep(0.005)
        cpu_s = used_cpu_s(process.pid) or cpu_s
    return time.monotonic() - began_s, cpu_s


def used_cpu_s(pid: int) -> float:
    """Of a process, which may have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def assert_exactly_once(output: Path, count: int) -> None:
    found = Counter(record["custom_id"] for record in records(output))
    assert found == Counter(f"c{number}" for number in range(count))


def assert_soon(waits: list[tuple[float, float]]) -> None:
    """What it takes on a quiet machine is the CPU's time; neighbours stretch the other."""
    print(f"(wall, CPU) seconds until work goes on: {sorted(waits)}")
    assert max(cpu_s for _, cpu_s in waits) <= RESUME_S
    assert max(wall_s for wall_s, _ in waits) < 5 * RESUME_S


async def kill_and_resume(
    service: EmbeddedService, tmp_path: Path, num_kills: int, count: int
) -> list[tuple[float, float]]:
    """(wall, CPU) seconds from each start of a runner to its first record."""
    output, waits, rng = tmp_path / "results.jsonl", [], random.Random(5)
    path = write_requests(tmp_path, count, 48)
    where = ("--output", output, "--server", service.address, "--max-in-flight", 4)
    for _ in range(num_kills):
        process = await queue("resume", path, *where)
        if rng.random() < 0.3:
            await asyncio.sleep(rng.uniform(0, 1.2))  # at any moment of the start, too
        else:
            waits.append(await until_more(output, num_lines(output), process))
            await asyncio.sleep(rng.uniform(0, 0.15))
        if process.returncode is None:
            process.kill()
        await process.communicate()
    assert num_lines(output) < count, "all was done before the last kill: give it more to do"
    code, _, err = await done(await queue("resume", path, *where))
    assert code == 0, err
    async with TandemClient(service.address) as client:
        alone = SamplingParams(max_tokens=48, ignore_eos=True)
        wanted = await client.generate("story 0", alone)
    assert_exactly_once(output, count)
    assert (await facts(output))["duplicated"] == 0
    [first] = [record for record in records(output) if record["custom_id"] == "c0"]
    assert first["response"]["body"]["choices"][0]["text"] == wanted.completions[0].text
    return waits


@pytest.mark.asyncio(loop_scope="module")
async def test_a_runner_killed_three_times_loses_and_repeats_nothing(service, tmp_path: Path) -> None:
    assert_soon(await kill_and_resume(service, tmp_path, 3, 150))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_runner_killed_twenty_times_loses_and_repeats_nothing(service, tmp_path: Path) -> None:
    assert_soon(await kill_and_resume(service, tmp_path, 24, 1000))


async def test_a_worker_killed_during_a_queue_costs_no_line(tmp_path: Path) -> None:
    output, path = tmp_path / "results.jsonl", write_requests(tmp_path, 120)
    async with EmbeddedService(config()) as service:
        process = await queue("submit", path, "--output", output, "--server", service.address)
        for name in ("decode-0", "prefill-0"):
            await until_more(output, num_lines(output), process)
            os.kill(service.pids()[name], signal.SIGKILL)
        code, _, err = await done(process)
    assert code == 0, err
    assert_exactly_once(output, 120)


async def test_an_embedded_service_answers_every_kind_of_line(tmp_path: Path) -> None:
    path, output = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    lines = [
        '{"prompt": "one"}',
        '{"custom_id": "ids", "token_ids": [104, 105], "max_tokens": 3, "logprobs": 1}',
        '{"custom_id": "two", "prompt": ["a", "b"], "max_tokens": 2, "n": 2, "echo": true, "temperature": 1}',
        '{"messages": [{"role": "user", "content": "hi"}]}',
        '{"prompt": "x", "temperature": 9}',
        '{"prompt": "x", "model": "another"}',
        '{"prompt": "cut off',
    ]
    path.write_text("\n".join(lines))
    process = await queue(
        *("submit", path, "--output", output, "--model", tiny_llama(), "--max-tokens", 5, "--json")
    )
    code, out, err = await done(process)
    assert code == 1, err
    found = {record["line"]: record for record in records(output)}
    assert json.loads(out)["completed"] == 3
    assert {line: record["error"]["code"] for line, record in found.items() if record["error"]} == {
        4: "BAD_PARAM",
        5: "BAD_PARAM",
        6: "NO_SUCH_MODEL",
        7: "BAD_LINE",
    }
    assert "need a chat template, and this model has none" in found[4]["error"]["message"]
    bodies = {line: found[line]["response"]["body"] for line in (1, 2, 3)}
    assert bodies[1]["usage"]["completion_tokens"] == 5
    assert bodies[1]["object"] == "text_completion"
    assert len(bodies[2]["choices"][0]["logprobs"]["token_logprobs"]) == 3
    assert [choice["text"][0] for choice in bodies[3]["choices"]] == ["a", "a", "b", "b"]
    stages = found[1]["metrics"]
    assert stages["ttft_ms"] == pytest.approx(stages["queue_ms"] + stages["prefill_ms"], abs=0.01)

    code, out, _ = await done(await queue("results", output, "--errors", "--json"))
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 2, 3, 4, 5, 6, 7]
    code, out, _ = await done(await queue("results", output))
    assert out.startswith("── line-1\n")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_queue_in_the_background_is_watched_and_cancelled(service, tmp_path: Path) -> None:
    output, path = tmp_path / "results.jsonl", write_requests(tmp_path, 4000, 100)
    where = ("--output", output, "--server", service.address)
    code, out, err = await done(await queue("submit", path, *where, "--detach", "--json"))
    assert code == 0, err
    assert (await facts(output))["pid"] == json.loads(out)["pid"]

    code, _, err = await done(await queue("resume", path, *where))
    assert code == 3, err
    assert f"is in use by process {json.loads(out)['pid']}" in err
    code, _, err = await done(await queue("submit", path, *where))
    assert code == 2
    assert "has a queue already; go on with: tandem queue resume" in err

    code, out, _ = await done(await queue("cancel", output, "--json"))
    cancelled = json.loads(out)
    assert (code, cancelled["state"], cancelled["pid"]) == (0, "cancelled", None)
    assert cancelled["completed"] == num_lines(output) < 4000
    code, _, err = await done(await queue("resume", path, *where))
    assert code == 2
    assert "was cancelled" in err


@pytest.mark.asyncio(loop_scope="module")
async def test_ctrl_c_ends_in_order_and_the_queue_goes_on_with_its_own_options(
    service, tmp_path: Path
) -> None:
    path, output = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    path.write_text("".join(f"story {number}\n" for number in range(300)))
    options = ("--server", service.address, "--max-tokens", 30, "--temperature", 0.5)
    process = await queue("submit", path, "--output", output, *options)
    await until_more(output, 0, process)
    process.send_signal(signal.SIGINT)
    code, _, err = await done(process)
    assert code == 130
    assert "go on with: tandem queue resume" in err
    assert 0 < num_lines(output) < 300
    code, _, err = await done(await queue("resume", path, "--output", output))
    assert code == 0, err
    path.write_text(path.read_text() + "one more\n")
    code, _, err = await done(await queue("resume", path, "--output", output))
    assert code == 2
    assert "has changed since this queue was started" in err
    assert Counter(record["line"] for record in records(output)) == Counter(range(1, 301))
    tokens = {record["response"]["body"]["usage"]["completion_tokens"] for record in records(output)}
    assert max(tokens) == 30


@pytest.mark.parametrize(
    ("input_", "output", "says"),
    [
        ("none.jsonl", "results.jsonl", "is no file"),
        ("requests.jsonl", "requests.jsonl", "--output is the input file"),
        ("requests.jsonl", "none/results.jsonl", "there is no folder"),
        ("requests.jsonl", "link.jsonl", "it is a symbolic link"),
        ("requests.jsonl", "mine.txt", "exists and is no queue's"),
        ("twice.jsonl", "results.jsonl", "custom_id 'c0' is that of line 1 too"),
        ("empty.jsonl", "results.jsonl", "has no lines"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_touched(tmp_path, input_, output, says) -> None:
    path = write_requests(tmp_path, 2)
    (tmp_path / "twice.jsonl").write_text(path.read_text() * 2)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "mine.txt").write_text("precious\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "mine.txt")
    before = path.read_bytes()
    command = ["queue", "submit", str(tmp_path / input_), "--output", str(tmp_path / output)]
    for _ in range(2):  # what was refused is no queue yet
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, ConfigError), refused.output
        assert says in str(refused.exception)
        assert refused.stdout == ""
    assert path.read_bytes() == before
    assert (tmp_path / "mine.txt").read_text() == "precious\n"


async def test_a_service_that_asks_for_a_token_gets_it_from_every_run(tmp_path: Path) -> None:
    path, output, keys = write_requests(tmp_path, 20), tmp_path / "results.jsonl", tmp_path / "keys"
    keys.write_text("a-token-of-this-test-and-no-other\n")
    keys.chmod(0o600)
    settings = replace(config(), security=SecurityConfig(api_key_file=keys))
    async with EmbeddedService(settings) as service:
        where = ("--output", output, "--server", service.address)
        code, _, err = await done(await queue("submit", path, *where))
        assert code == 1
        assert "NO_TOKEN" in err
        code, _, err = await done(await queue("submit", path, *where, "--api-key-file", keys))
        assert code == 0, err
    assert_exactly_once(output, 20)
