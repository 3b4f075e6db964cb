"""The most that servers hold within limits: ours and, for vLLM's, a stand-in that knows its options and API.

The stand-in computes one request at a time and says only token ids: text that random weights do not have.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from bench import shapes
from bench.goodput import run as goodput
from bench.goodput.report import rows_of, sheet
from bench.goodput.run import Comparison, Load
from bench.goodput.systems import System, vllm
from bench.serve.arrivals import Arrival, Schedule
from bench.serve.driver import Driver
from bench.serve.metrics import Slo
from bench.serve.search import Found, Trial
from bench.serve.session import Model, Options
from bench.serve.target import HttpTarget
from bench.serve.workload import LoadRequest
from bench.vllm.peer import Settings
from bench.vllm.server import SERVED_NAME, starting
from tandem.errors import ConfigError
from tests.bench.serve.test_conversation import Answering
from tests.bench.test_peers import TINY

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings("checkpoint", threads=1, max_sequences=8, max_tokens=128)
LIMITS = {"loose": Slo(ttft_ms=200, itl_ms=200), "tight": Slo(ttft_ms=100, itl_ms=150)}
FAST = 64  # tokens of a step, by which the stand-in is told to compute fast
STAND_IN = """
import argparse, json, pathlib, subprocess, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("model", "served-model-name", "host", "dtype"):
    parser.add_argument("--" + name, required=True)
for name in ("port", "max-model-len", "max-num-seqs", "seed", "max-num-batched-tokens"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("--no-enable-prefix-caching", action="store_true")
parser.add_argument("--disable-uvicorn-access-log", action="store_true")
asked = parser.parse_args()
if asked.model == "broken":
    raise ValueError("no such model")
print("what a server prints on its way")
folder = pathlib.Path(__file__).parent
shared = folder / "shared-memory"
shared.touch()
stubborn = ["sleep", "600"]
tidy = ["sh", "-c", f"read line; sleep 0.2; rm {shared}"]  # when the server is gone
engine = subprocess.Popen(stubborn if asked.model == "stubborn" else tidy, stdin=subprocess.PIPE)
folder.joinpath("engine.pid").write_text(str(engine.pid))
folder.joinpath("asked.txt").open("a").write(json.dumps(vars(asked)) + "\\n")
gap_s = 0.02 if asked.max_num_batched_tokens else 0.3
computing = threading.Lock()

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/completions" and body["model"] == asked.served_model_name
        assert body["stream"] and body["ignore_eos"] and body["return_token_ids"] and body["temperature"] == 0
        self.send_response(200 if asked.dtype == "float32" else 500)
        self.end_headers()
        with computing:
            for number in range(body["max_tokens"]):
                time.sleep(gap_s)
                self.say({"choices": [{"index": 0, "text": "", "token_ids": [number]}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self.say({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\\n\\n")

    def say(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")

class Server(ThreadingHTTPServer):
    def handle_error(self, *args):
        pass  # a client that left

Server((asked.host, asked.port), Handler).serve_forever()
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that finds the stand-in; `-I` is its first argument, and would hide it."""
    folder = tmp_path / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    (folder / "api_server.py").write_text(STAND_IN)
    python = tmp_path / "python-with-vllm"
    python.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def state_of(pid: int) -> str:
    """Of a process: T for one that is stopped, Z for one whose parent has not asked, or nothing."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else ""


def engine_of(python: Path) -> int:
    return int((python.parent / "vllm" / "entrypoints" / "openai" / "engine.pid").read_text())


def wait_until(holds: Callable[[], bool], patience_s: float = 10) -> None:
    deadline_s = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def noted(name: str, system: System, turns: list[str]) -> System:
    """The system, and a note of each turn it gets."""

    def woken(slo: Slo):
        turns.append(name)
        return system.awake(slo)

    return replace(system, awake=woken)


async def one_request(url: str):
    [record] = await Driver(HttpTarget(url, SERVED_NAME, with_ids=True)).run([LoadRequest([1, 2], 3)], [0.0])
    return record


def test_a_server_sleeps_answers_and_leaves_nothing_behind(python: Path) -> None:
    with starting(python, replace(SETTINGS, step_tokens=FAST)) as server:
        server.wait_until_ready()
        engine = engine_of(python)
        server.sleep()
        wait_until(lambda: state_of(engine) == "T")
        server.wake()
        record = asyncio.run(one_request(server.url))
        assert (record.prompt_tokens, record.output_tokens, len(record.arrivals)) == (2, 3, 3)
        server.sleep()  # one that sleeps ends, too
    assert not (python.parent / "vllm" / "entrypoints" / "openai" / "shared-memory").exists()


@pytest.mark.slow
def test_what_does_not_leave_is_killed(python: Path) -> None:
    with starting(python, replace(SETTINGS, model="stubborn")) as server:
        server.wait_until_ready()
    wait_until(lambda: state_of(engine_of(python)) in ("", "Z"))


@pytest.mark.slow
def test_nothing_stays_asleep_when_the_run_is_killed(python: Path) -> None:
    code = f"""
from pathlib import Path
from bench.vllm.server import starting
from tests.bench.test_goodput import SETTINGS

with starting(Path({str(python)!r}), SETTINGS) as server:
    server.wait_until_ready()
    server.sleep()
    print("asleep", flush=True)
    input()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "asleep\n"
        engine = engine_of(python)
        wait_until(lambda: state_of(engine) == "T")
        run.kill()
    wait_until(lambda: state_of(engine) in ("", "Z"))


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_that_is_ended_takes_its_servers_along(python: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.cli", "bench", "goodput"]
    with (tmp_path / "said").open("w") as said:
        options = ["--shape", "raw", "--vllm-python", str(python), "--out", str(tmp_path / "out")]
        run = subprocess.Popen([*command, *options], cwd=ROOT, stdout=said, stderr=said)
        wait_until(lambda: "Tandem, loose limits" in (tmp_path / "said").read_text(), 60)
        run.terminate()
        assert run.wait(60) != 0
    wait_until(lambda: state_of(engine_of(python)) in ("", "Z"))


def test_servers_that_cannot_start_say_why(python: Path, tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=r"server ended: .*no such model; it needs vllm, in a build")
    with starting(python, replace(SETTINGS, model="broken")) as server, refused:
        server.wait_until_ready()
    missing = pytest.raises(ConfigError, match=r"server ended: .*No module named 'vllm'\); it needs vllm")
    with starting(Path(sys.executable), SETTINGS) as server, missing:
        server.wait_until_ready()
    nowhere = pytest.raises(ConfigError, match=r"server did not start: .*No such file")
    with nowhere, starting(tmp_path / "python", SETTINGS):
        pass


@pytest.mark.slow
def test_the_slow_server_holds_nothing_and_the_fast_one_what_it_can(python: Path) -> None:
    engines = {"fast": replace(SETTINGS, step_tokens=FAST), "slow": SETTINGS}
    model, arrival = Model(SERVED_NAME, 300, 128), Schedule(Arrival.POISSON, 4.0)
    options = Options(
        num_requests=10, arrival=arrival, input_lengths="8", output_lengths="2", trials=1, warm_up=1
    )
    turns, found = [], {}
    with ExitStack() as stack:
        systems = {name: noted(name, one, turns) for name, one in vllm(python, engines, stack).items()}
        asyncio.run(goodput.measure(systems, Load(4.0, LIMITS), model, options, math.inf, found.update))
    assert turns[:4] == ["fast", "slow", "fast", "slow"]
    rows = rows_of(found, LIMITS, list(engines))
    assert [(row.limits, row.system) for row in rows] == [
        (label, name) for label in LIMITS for name in engines
    ]
    for row in rows[1::2]:  # 300 ms between tokens are too many
        assert (row.rate, row.failing_rate is not None, row.ratio) == (None, True, None)
    loose, tight = rows[0], rows[2]
    assert (loose.failed, loose.ratio) == (0, 1.0)
    assert tight.rate <= loose.rate
    # A request takes 40 ms: of ten that come at once the last two wait too long for their first token.
    assert loose.failing_rate < 4.0 * 2**12


def test_runs_within_looser_limits_count_again_but_for_a_service_that_is_told_them(monkeypatch) -> None:
    monkeypatch.setattr("bench.serve.search.MAX_DOUBLINGS", 1)
    turns, found = [], {}
    limits = {name: Slo(e2e_ms=most_ms) for name, most_ms in (("loose", 60_000), ("tight", 30_000))}
    systems = {
        name: noted(name, System(lambda slo: nullcontext(Answering()), follows_limits), turns)
        for name, follows_limits in (("ours", True), ("vLLM", False))
    }
    options = Options(num_requests=3, arrival=Schedule(Arrival.POISSON, 50), trials=1, warm_up=0)
    model = Model("m", 1000, 2048)
    asyncio.run(goodput.measure(systems, Load(50.0, limits), model, options, math.inf, found.update))
    assert {rate.holding_rate for rate in found.values()} == {100}
    assert Counter(turns) == {"ours": 4, "vLLM": 2}


def test_nothing_is_begun_when_time_is_over(python: Path) -> None:
    options = Options(num_requests=2, arrival=Schedule(Arrival.POISSON, 4.0))
    never, model = {"never": System(pytest.fail)}, Model("m", 9, 99)
    asyncio.run(goodput.measure(never, Load(1.0, LIMITS), model, options, -math.inf, pytest.fail))


def test_a_server_that_refuses_everything_is_an_error_and_no_slow_one(python: Path) -> None:
    options = Options(num_requests=2, arrival=Schedule(Arrival.POISSON, 400.0), output_lengths="2", trials=1)
    model = Model(SERVED_NAME, 300, 128)
    with ExitStack() as stack:
        systems = vllm(python, {"other": replace(SETTINGS, dtype="int3", step_tokens=FAST)}, stack)
        with pytest.raises(ConfigError, match="other answered no request: HTTP_500"):
            asyncio.run(goodput.measure(systems, Load(400.0, LIMITS), model, options, math.inf, pytest.fail))


def test_rows_by_hand() -> None:
    def found(rate: float | None) -> Found:
        trials = [Trial(rate or 1.0, 0.9, 1.0, True, 3, errors=2), Trial(9.0, 0.5, 1.0, False, 3)]
        return Found(rate, 9.0, 1.0, (0.0, 2.0), trials)

    finds = {
        ("loose", "ours"): found(6.0),
        ("loose", "theirs"): found(4.0),
        ("loose", "another"): found(None),
    }
    names = ["ours", "theirs", "another"]
    ours, theirs, another = rows = rows_of(finds, LIMITS, names)
    early = {key: one for key, one in finds.items() if key[1] != "ours"}
    assert [(row.system, row.ratio) for row in rows_of(early, LIMITS, names)] == [
        ("theirs", None),
        ("another", None),
    ]
    assert (ours.rate, ours.ratio, ours.good, ours.failed, ours.client_late) == (6.0, 1.0, 0.9, 2, True)
    assert (ours.goodput, another.goodput) == (1.0, None)
    assert (theirs.ratio, theirs.failing_rate, theirs.ttft_ms) == (1.5, 9.0, 200)
    assert (another.rate, another.good, another.ratio, another.client_late) == (None, None, None, False)
    assert [row[2:] for row in sheet("", rows).rows] == [
        ("6.00*", "9.00", "90%", "1.00", "2", "1.00"),
        ("4.00*", "9.00", "90%", "1.00", "2", "1.50"),
        ("none", "9.00", "–", "–", "2", "–"),
    ]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    comparison = Comparison("1b", None, (None,), False, 2, 1, 1.0, tmp_path)
    with pytest.raises(ConfigError, match="limits for the shapes raw, 111m, none for 1b"):
        goodput.run(comparison, as_json=False)
    with pytest.raises(ConfigError, match="--speculation needs --shape raw"):
        goodput.run(replace(comparison, shape="111m", with_speculation=True), as_json=False)
    with pytest.raises(ConfigError, match="named loose, middle, tight, none named strict"):
        goodput.run(replace(comparison, shape="raw", limits=("loose", "strict")), as_json=False)
    with pytest.raises(ConfigError, match=r"quantization must be one of none, .*; not int3"):
        goodput.run(replace(comparison, shape="raw", quantizations=("int8", "int3")), as_json=False)
    with pytest.raises(ConfigError, match="No module named 'vllm'"):
        goodput.run(replace(comparison, shape="raw", vllm_python=Path(sys.executable)), as_json=False)


@pytest.mark.slow
@pytest.mark.e2e
def test_our_service_beside_the_stand_in(python: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(shapes, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    limits = {"loose": Slo(ttft_ms=5000, itl_ms=250), "tight": Slo(ttft_ms=1, itl_ms=1)}
    monkeypatch.setitem(goodput.LOADS, "tiny", Load(8.0, limits))
    monkeypatch.setattr(goodput, "INPUT_TOKENS", "mix:8*4,40")
    monkeypatch.setattr(goodput, "OUTPUT_TOKENS", 4)
    monkeypatch.setattr("bench.serve.search.MAX_DOUBLINGS", 1)
    comparison = Comparison(
        "tiny", python, (None, FAST), False, 6, 1, 10.0, tmp_path / "out", ("loose",), ("int8",)
    )
    document = goodput.run(comparison, as_json=False)
    rates = {row["system"]: row["rate"] for row in document["rows"]}
    fast = ["Tandem", "Tandem, int8 weights", f"vLLM, steps of {FAST} tokens"]
    assert list(rates) == [*fast[:2], "vLLM", fast[2]]
    assert rates["vLLM"] is None  # 300 ms between its tokens
    assert all(0 < rates[name] <= 16 for name in fast)
    assert document == json.loads((tmp_path / "out" / "goodput.json").read_text())
    assert document["skipped"] == []
    assert "TTFT ≤ 5000 ms" in capsys.readouterr().out
    asked = python.parent / "vllm" / "entrypoints" / "openai" / "asked.txt"
    started = [json.loads(line) for line in asked.read_text().splitlines()]
    assert {each["max_num_batched_tokens"] for each in started} == {None, FAST}
    assert {(each["dtype"], each["max_model_len"]) for each in started} == {("float32", 1028)}
    assert all(each["no_enable_prefix_caching"] for each in started)
