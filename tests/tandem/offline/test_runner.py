"""Runs over real files with a service that is a function: every line gets exactly one record."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.errors import (
    DataLoss,
    InvalidRequest,
    Overloaded,
    StreamBroken,
    Unauthenticated,
    Unavailable,
)
from tandem.offline import retries
from tandem.offline.journal import StorageError
from tandem.offline.lines import Entry, LineParser
from tandem.offline.members import Answer
from tandem.offline.progress import Progress
from tandem.offline.results import Results, error_path
from tandem.offline.runner import Limits, Runner
from tandem.offline.source import FileSource
from tandem.offline.window import Window

ROOT = Path(__file__).resolve().parents[3]
OVERLOADED = Overloaded("QUEUE_FULL", "full", retry_after_ms=1)
AWAY = Unavailable("NO_DECODE", "away")


@pytest.fixture(autouse=True)
def _soon(monkeypatch) -> None:
    monkeypatch.setattr(retries, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(retries, "MAX_BACKOFF_S", 0.01)


def requests(folder: Path, count: int) -> Path:
    path = folder / "requests.jsonl"
    lines = [{"custom_id": f"c{n}", "prompt": str(n)} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(output: Path) -> list[dict]:
    """Of both files; each line must be whole."""
    paths = [path for path in (output, error_path(output)) if path.exists()]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


async def answer(entry: Entry) -> Answer:
    await asyncio.sleep(0)
    return Answer("r", {"text": entry.body["prompt"]}, {}, 3)


def runner(path: Path, execute: Callable = answer, check: Callable = lambda entry: None, **limits) -> Runner:
    results = Results(path.with_name("results.jsonl"))
    progress = Progress(10, results.num_completed, results.num_failed)
    limits = {"max_in_flight": 8, "grace_s": 0.05, **limits}
    source = FileSource(path, LineParser(False, {}), check, results.finished)
    return Runner(source, execute, results, progress, Limits(**limits))


async def run(one: Runner) -> Progress:
    try:
        await one.run()
    finally:
        await one.results.close()
    return one.progress


async def test_every_line_has_one_record_in_openais_shape(tmp_path: Path) -> None:
    path = requests(tmp_path, 100)
    with path.open("a") as file:
        file.write("\n{broken\n")
    progress = await run(runner(path))
    assert (progress.completed, progress.failed, progress.output_tokens) == (100, 1, 300)
    found = {record["custom_id"]: record for record in records(tmp_path / "results.jsonl")}
    assert len(found) == 101
    assert found["c7"]["response"] == {"status_code": 200, "request_id": "r", "body": {"text": "7"}}
    assert found["c7"]["error"] is None
    bad = found["line-102"]
    assert (bad["response"], bad["error"]["line"], bad["error"]["column"]) == (None, 102, 2)


async def test_a_second_run_does_only_what_is_missing(tmp_path: Path) -> None:
    path, asked = requests(tmp_path, 50), []

    async def note(entry: Entry) -> Answer:
        asked.append(entry.custom_id)
        return await answer(entry)

    await run(runner(path, note))
    output = tmp_path / "results.jsonl"
    whole = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(whole[:30]) + whole[30][:-5])
    asked.clear()
    await run(runner(path, note))
    assert len(asked) == 20
    assert Counter(record["custom_id"] for record in records(output)) == Counter(f"c{n}" for n in range(50))


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_whatever_ends_a_run_wherever_the_files_are_cut_each_line_has_one_record(
    tmp_path_factory, data
) -> None:
    path = requests(tmp_path_factory.mktemp("queue"), 12)
    output = path.with_name("results.jsonl")
    for _ in range(data.draw(st.integers(1, 4))):
        left = data.draw(st.integers(0, 10))

        async def until_killed(entry: Entry) -> Answer:
            nonlocal left
            left -= 1
            if left < 0:
                await asyncio.Event().wait()
            if entry.line % 5 == 0:
                raise InvalidRequest("NEVER_FITS", "never")
            return await answer(entry)

        async def interrupted(execute=until_killed) -> None:
            one = runner(path, execute, grace_s=0)
            asyncio.get_running_loop().call_later(0.01, one.stop.set)
            await run(one)

        asyncio.run(interrupted())
        for file in (output, error_path(output)):
            content = file.read_bytes()
            file.write_bytes(content[: max(0, len(content) - data.draw(st.integers(0, 300)))])
    asyncio.run(run(runner(path)))
    assert Counter(record["custom_id"] for record in records(output)) == Counter(f"c{n}" for n in range(12))


def test_an_output_cut_at_any_byte_loses_no_finished_record_and_is_completed(tmp_path: Path) -> None:
    """Three records, cut at every byte (in `make test` at every ninth, and about where records end)."""
    path, output = requests(tmp_path, 3), tmp_path / "results.jsonl"
    asyncio.run(run(runner(path)))
    whole = output.read_bytes()
    step = 1 if "TANDEM_QUEUE_FAULTS" in os.environ else 9
    ends = [place for place in range(len(whole)) if b"\n" in whole[max(0, place - 2) : place + 2]]
    for cut in sorted({*range(0, len(whole) + 1, step), *ends}):
        output.write_bytes(whole[:cut])
        kept = whole[:cut].splitlines(keepends=True)
        asyncio.run(run(runner(path)))
        found = output.read_bytes().splitlines(keepends=True)
        assert [line for line in kept if line.endswith(b"\n")] == found[: whole[:cut].count(b"\n")], cut
        assert Counter(json.loads(line)["custom_id"] for line in found) == Counter(("c0", "c1", "c2")), cut


async def test_what_may_be_sent_again_is_until_it_is_a_dead_letter(tmp_path: Path) -> None:
    path, tries = requests(tmp_path, 4), Counter[str]()

    async def moody(entry: Entry) -> Answer:
        tries[entry.custom_id] += 1
        match entry.custom_id, tries[entry.custom_id]:
            case "c0", 1:
                raise StreamBroken(2)
            case "c1", _:
                raise DataLoss
            case "c2", _:
                raise InvalidRequest("NEVER_FITS", "needs 9 blocks")
            case "c3", n if n < 9:
                raise OVERLOADED
        return await answer(entry)

    progress = await run(runner(path, moody))
    assert tries == {"c0": 2, "c1": 3, "c2": 1, "c3": 9}
    assert (progress.completed, progress.failed) == (2, 2)
    found = {record["custom_id"]: record for record in records(tmp_path / "results.jsonl")}
    assert found["c3"]["metrics"]["attempts"] == 9
    assert found["c1"]["error"]["code"] == "KV_CORRUPT"
    assert found["c1"]["metrics"]["attempts"] == 3
    assert found["c2"]["response"]["status_code"] == 400
    assert found["c2"]["response"]["body"]["error"]["message"] == "needs 9 blocks"


async def test_a_service_that_is_away_is_waited_for(tmp_path: Path) -> None:
    path, calls = requests(tmp_path, 20), 0

    async def away_at_first(entry: Entry) -> Answer:
        nonlocal calls
        calls += 1
        if calls <= 100:
            raise AWAY
        return await answer(entry)

    progress = await run(runner(path, away_at_first))
    assert (progress.completed, progress.failed) == (20, 0)


async def test_a_line_that_brings_the_service_down_is_a_dead_letter_where_others_are_answered(
    tmp_path: Path,
) -> None:
    path = requests(tmp_path, 200)

    async def poisonous(entry: Entry) -> Answer:
        if entry.custom_id != "c0":
            await asyncio.sleep(0.002)
            return await answer(entry)
        await asyncio.sleep(0.01)
        raise AWAY

    progress = await run(runner(path, poisonous, max_in_flight=2))
    assert (progress.completed, progress.failed) == (199, 1)


@pytest.mark.parametrize(
    ("error", "patience_s"), [(AWAY, 0.05), (Unauthenticated("NO_TOKEN", "no token"), 600)]
)
async def test_what_fails_every_line_ends_the_run_and_fails_none(tmp_path: Path, error, patience_s) -> None:
    async def fail(entry: Entry) -> Answer:
        raise error

    with pytest.raises(type(error)):
        await run(runner(requests(tmp_path, 20), fail, patience_s=patience_s))
    assert records(tmp_path / "results.jsonl") == []


async def test_a_disk_that_is_full_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    path = requests(tmp_path, 20)
    one = runner(path)
    monkeypatch.setattr(
        one.results._output,
        "append",
        lambda group: (_ for _ in ()).throw(StorageError(path, OSError(28, "full"))),
    )
    with pytest.raises(StorageError):
        await run(one)
    assert records(tmp_path / "results.jsonl") == []
    assert (await run(runner(path))).completed == 20


async def test_no_more_are_in_flight_than_allowed_and_fewer_when_refused(tmp_path: Path) -> None:
    running = most = refused = 0

    async def crowded(entry: Entry) -> Answer:
        nonlocal running, most, refused
        running += 1
        most = max(most, running)
        try:
            if running > 4:
                refused += 1
                raise OVERLOADED
            await asyncio.sleep(0.003)
            return await answer(entry)
        finally:
            running -= 1

    progress = await run(runner(requests(tmp_path, 300), crowded, max_in_flight=16))
    assert progress.completed == 300
    assert most <= 16
    assert refused < 300  # of 300 lines; with a fixed window nearly every one is refused several times


async def test_the_window_halves_once_for_refusals_that_come_together() -> None:
    window = Window(16)
    generations = [await window.enter() for _ in range(16)]
    assert [window.note_refusal(generation) for generation in generations] == [1] * 16
    assert window.size == 8
    for _ in range(100):
        window.note_success()
    assert 8 < window.size <= 16


def test_rates_are_of_the_last_half_minute_and_tell_the_time_left() -> None:
    now = 0.0
    progress = Progress(100, 10, 0, clock=lambda: now)
    for _ in range(20):
        now += 1.0
        progress.note(5)
    progress.note(0, is_failure=True)
    snapshot = progress.snapshot()
    assert (snapshot.done, snapshot.failed) == (31, 1)
    assert snapshot.tokens_per_s == pytest.approx(100 / 20)
    assert snapshot.goodput_rps == pytest.approx(20 / 20)
    assert snapshot.eta_s == pytest.approx(69 / (21 / 20))
    now += 31
    assert progress.snapshot().eta_s is None


MEMORY = """
import asyncio, resource, sys
from pathlib import Path
from tandem.offline.census import take_census
from tandem.offline.lines import LineParser
from tandem.offline.members import Answer
from tandem.offline.progress import Progress
from tandem.offline.results import Results
from tandem.offline.runner import Limits, Runner
from tandem.offline.source import FileSource

async def answer(entry):
    return Answer("r", {"n": entry.line}, {}, 1)

async def main():
    path, parser = Path(sys.argv[1]), LineParser(False, {})
    census = take_census(path, parser)
    results = Results(path.with_name("results.jsonl"))
    progress = Progress(census.total, 0, 0)
    source = FileSource(path, parser, lambda entry: None, results.finished)
    await Runner(source, answer, results, progress, Limits(256)).run()
    await results.close()
    print(progress.completed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)

asyncio.run(main())
"""


def peak_mib(path: Path, count: int, bytes_each: int) -> int:
    """Of a process that runs the whole file."""
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"custom_id": f"c{number}", "prompt": "x" * bytes_each}) + "\n")
    for name in ("results.jsonl", "results.errors.jsonl"):
        path.with_name(name).unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=1000,
    )
    completed, peak = map(int, done.stdout.split())
    assert completed == count
    return peak


# The long tier is TANDEM_QUEUE_MB=1000 (docs/queue.md).
LARGE_MB = int(os.environ.get("TANDEM_QUEUE_MB", "50"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """50 MB in 50,000 lines against 2 MB in 2,000."""
    path = tmp_path / "requests.jsonl"
    small, large = peak_mib(path, 2_000, 970), peak_mib(path, 1000 * LARGE_MB, 970)
    print(f"{path.stat().st_size / 1e6:.0f} MB: {large} MiB at most, {small} MiB with 2 MB")
    assert path.stat().st_size > 0.97e6 * LARGE_MB
    assert large - small < 16, (small, large)
