"""Queues in a real Redis: whoever is killed, each line ends with exactly one record."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tandem.errors import ConfigError, DataLoss
from tandem.offline import members
from tandem.offline.lines import Entry, LineParser
from tandem.offline.progress import Progress
from tandem.offline.results import Results, error_path
from tandem.offline.runner import Limits, Runner
from tandem.offline.shared.owner import Owner
from tandem.offline.shared.patience import Patience
from tandem.offline.shared.queue import SharedQueue
from tandem.offline.shared.run import OwnedRun
from tandem.offline.shared.runner import MAX_DELIVERIES, SharedRunner
from tandem.offline.source import FileSource
from tests.redis_server import RedisServer, running
from tests.tandem.offline.shared_process import LEASE_S, answer

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[3]
NUM_KILLS = int(
    os.environ.get("TANDEM_QUEUE_KILLS", "6")
)  # of runners, owner and Redis; 60 are the long tier
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("redis"), "--appendonly", "yes") as started:
        yield started


@pytest.fixture
def queue(server, request) -> SharedQueue:
    return SharedQueue(server.url, f"q{abs(hash(request.node.name))}", LEASE_S)


def write_requests(folder: Path, count: int) -> Path:
    path = folder / "requests.jsonl"
    lines = (json.dumps({"custom_id": f"c{n}", "prompt": str(n)}) + "\n" for n in range(1, count + 1))
    path.write_text("".join(lines))
    return path


def records(output: Path) -> list[dict]:
    paths = [path for path in (output, error_path(output)) if path.exists()]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def assert_exactly_once(output: Path, count: int) -> dict[str, dict]:
    found = records(output)
    assert Counter(r["custom_id"] for r in found) == Counter(f"c{n}" for n in range(1, count + 1))
    return {record["custom_id"]: record for record in found}


def entry(line: int) -> Entry:
    return Entry(line, f"c{line}", "/v1/completions", {"prompt": str(line)}, f"{line:032x}")


def record(line: int, text: str = "") -> dict:
    return members.of_answer(entry(line), members.Answer("r", {"text": text}, {}, 1), attempts=1)


async def run_owner(queue: SharedQueue, path: Path, execute=answer, **limits) -> Progress:
    results = Results(path.with_name("results.jsonl"))
    total = num_lines(path)
    progress = Progress(total, results.num_completed, results.num_failed)
    source = FileSource(path, LineParser(False, {}), lambda entry: None, results.finished)
    shared = SharedRunner(queue, 5.0)
    limits = {"max_in_flight": 8, "grace_s": 0.05, **limits}
    runner = Runner(shared, execute, shared, Progress(0, 0, 0), Limits(**limits))
    await asyncio.to_thread(queue.open, "me", {"total": str(total)})
    try:
        await OwnedRun(Owner(queue, source, results, progress, Patience(5.0)), runner, shared).run()
    finally:
        await results.close()
    return progress


async def run_runner(queue: SharedQueue, execute=answer) -> int:
    """How many lines it did."""
    shared = SharedRunner(queue, 5.0)
    async with shared:
        runner = Runner(shared, execute, shared, Progress(0, 0, 0), Limits(max_in_flight=8))
        await runner.run()
    return runner.progress.completed


# --- one line, one record ---


def test_a_line_is_done_once_and_only_by_the_runner_that_holds_it(queue):
    queue.open("me", {"total": "2"})
    queue.offer([entry(1), entry(2)])
    queue.offer([entry(1)])  # again, as a reply was lost
    assert queue.num_open() == 2
    queue.beat("a")
    first, second = queue.take("a", 10)
    assert queue.take("b", 10) == []
    assert not queue.finish("b", first, "", record(1, "stolen"))
    assert queue.finish("a", first, "", record(1))
    assert not queue.finish("a", first, "", record(1, "again"))
    queue.beat("a")
    assert queue.claim_from_dead("b", 10) == []
    queue.leave("a")
    [taken] = queue.claim_from_dead("b", 10)
    assert (taken.entry, taken.deliveries) == (second.entry, 2)
    assert not queue.finish("a", second, "", record(2, "late"))
    assert queue.finish("b", taken, "DEAD_LETTER", record(2))
    texts = {
        r.line: (r.is_failure, r.members["response"]["body"]["text"]) for r in queue.records(9, block=False)
    }
    assert texts == {1: (False, ""), 2: (True, "")}
    assert queue.counts() == {"completed": 1, "failed": 1}
    assert queue.num_open() == 0


def test_another_owner_is_refused_and_the_same_one_goes_on(queue):
    queue.open("me", {"total": "1"})
    queue.open("me", {"total": "1"})
    with pytest.raises(ConfigError, match="already: join it with"):
        queue.open("you", {"total": "9"})
    assert queue.job()["total"] == "1"
    with pytest.raises(ConfigError, match="must be 1 to 64"):
        SharedQueue("redis://localhost", "a b")


def test_a_redis_that_would_lose_the_queue_is_refused(tmp_path):
    with (
        running(tmp_path) as server,
        pytest.raises(ConfigError, match="set appendonly to yes"),
    ):
        SharedQueue(server.url, "q").check_server()
    with pytest.raises(ConfigError, match=r"cannot use Redis at redis://127\.0\.0\.1:1/0: ConnectionError"):
        SharedQueue("redis://127.0.0.1:1/0", "q").check_server()


# --- whole runs ---


async def test_several_runners_share_a_queue_and_every_key_goes_by_itself(queue, server, tmp_path):
    path = write_requests(tmp_path, 150)
    path.write_text(path.read_text() + "{broken\n")
    owner = asyncio.create_task(run_owner(queue, path))
    await asyncio.sleep(0.2)
    shares = await asyncio.gather(*(run_runner(queue) for _ in range(2)))
    progress = await owner
    assert (progress.completed, progress.failed, progress.output_tokens) == (150, 1, 450)
    assert min(shares) > 10
    found = {r["custom_id"]: r for r in records(tmp_path / "results.jsonl")}
    assert len(found) == 151
    assert found["c7"]["response"]["body"]["text"] == "7"
    assert queue.job()["ended"] == "finished"
    assert queue.counts() == {"completed": 150, "failed": 0}
    with server.client() as client:
        keys = list(client.scan_iter(f"v1:queue:{{{queue.name}}}*"))
        assert all(client.pttl(name) > 0 for name in keys)


async def test_what_fails_for_itself_is_a_dead_letter_and_stops_nobody(queue, server, tmp_path):
    async def moody(entry: Entry):
        if entry.custom_id == "c3":
            raise DataLoss
        return await answer(entry)

    progress = await run_owner(queue, write_requests(tmp_path, 20), moody)
    assert (progress.completed, progress.failed) == (19, 1)
    found = assert_exactly_once(tmp_path / "results.jsonl", 20)
    assert found["c3"]["error"]["code"] == "KV_CORRUPT"
    with server.client() as client:
        [(_, dead)] = client.xrange(f"v1:queue:{{{queue.name}}}:dead")
    assert (dead[b"line"], dead[b"code"]) == (b"3", b"KV_CORRUPT")


async def test_a_line_that_ends_its_runners_is_a_dead_letter(queue, tmp_path):
    queue.open("me", {"total": "3"})
    queue.offer([entry(1)])
    queue.beat("r0")
    queue.take("r0", 1)
    for n in range(MAX_DELIVERIES):
        queue.leave(f"r{n}")
        assert queue.claim_from_dead(f"r{n + 1}", 1)
    queue.leave(f"r{MAX_DELIVERIES}")
    progress = await run_owner(queue, write_requests(tmp_path, 3))
    assert (progress.completed, progress.failed) == (2, 1)
    found = assert_exactly_once(tmp_path / "results.jsonl", 3)
    assert found["c1"]["error"]["code"] == "DEAD_LETTER"


async def test_records_that_the_files_have_lost_are_made_again(queue, tmp_path):
    path, output = write_requests(tmp_path, 60), tmp_path / "results.jsonl"

    async def slow(entry: Entry):
        await asyncio.sleep(0.05)
        return await answer(entry)

    first = asyncio.create_task(run_owner(queue, path, slow))
    while num_lines(output) < 20:  # noqa: ASYNC110 (nobody tells a test)
        await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.wait({first})
    whole = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(whole[:10]) + whole[10][:-9])
    for _ in range(2):  # the second time when the queue had been finished
        await run_owner(queue, path)
        assert_exactly_once(output, 60)
        assert queue.job()["ended"] == "finished"
        output.write_bytes(output.read_bytes()[:-9])


async def test_a_cancelled_queue_ends_everywhere_and_keeps_what_is_finished(queue, tmp_path):
    async def slow(entry: Entry):
        await asyncio.sleep(0.1)
        return await answer(entry)

    owner = asyncio.create_task(run_owner(queue, write_requests(tmp_path, 500), slow))
    await asyncio.sleep(0.3)
    runner = asyncio.create_task(run_runner(queue, slow))
    await asyncio.sleep(0.3)
    queue.end("cancelled")
    with pytest.raises(ConfigError, match="was cancelled"):
        await owner
    await asyncio.wait_for(runner, 5)
    finished = records(tmp_path / "results.jsonl")
    assert 0 < len(finished) < 500
    assert len({r["custom_id"] for r in finished}) == len(finished)


# --- processes that die ---


def start(role: str, server: RedisServer, name: str, path: Path) -> subprocess.Popen[bytes]:
    arguments = [role, server.url, name, str(path), str(path.with_name("results.jsonl"))]
    command = [sys.executable, "-m", "tests.tandem.offline.shared_process", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def num_lines(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


def until_more(output: Path, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Until somebody has added a record: work goes on."""
    than, until_s = num_lines(output), time.monotonic() + PATIENCE_S
    while num_lines(output) <= than and processes["owner"].poll() is None:
        assert time.monotonic() < until_s, "nothing goes on"
        time.sleep(0.01)


def test_runners_owner_and_redis_killed_at_random_lose_and_repeat_nothing(tmp_path, tmp_path_factory):
    count, rng = 250 + 300 * NUM_KILLS, random.Random(7)
    path, output = write_requests(tmp_path, count), tmp_path / "results.jsonl"
    with running(tmp_path_factory.mktemp("killed"), "--appendonly", "yes") as server:
        roles = {"owner": "owner", "r1": "runner", "r2": "runner"}
        processes = {who: start(role, server, "q", path) for who, role in roles.items()}
        killed: Counter[str] = Counter()
        try:
            for kill in range(NUM_KILLS):
                until_more(output, processes)
                time.sleep(rng.uniform(0, 0.2))
                assert num_lines(output) < count, "all was done before the last kill: give it more to do"
                who = ("r1", "owner", "redis", "r2")[kill % 4]
                killed[who] += 1
                if who == "redis":
                    server.kill()
                    time.sleep(rng.uniform(0, 0.3))
                    server.start()
                    continue
                processes[who].kill()
                processes[who].communicate()
                processes[who] = start(roles[who], server, "q", path)
            for who, process in processes.items():
                _, said = process.communicate(timeout=PATIENCE_S + count / 20)
                assert process.returncode == 0, (who, said.decode())
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()
    assert_exactly_once(output, count)
    print(f"killed {dict(killed)} over {count} lines")
