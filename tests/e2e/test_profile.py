"""`tandem serve --profile`: real processes write their traces when the window closes, and at SIGTERM."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tandem.sampling import SamplingParams
from tandem.sync_client import SyncTandemClient
from tests.checkpoints import tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


@contextmanager
def serving(folder: Path, *options: object) -> Iterator[tuple[str, list[str]]]:
    """The address of a service that is ended by SIGTERM, and then what it said on standard error."""
    command = [sys.executable, "-m", "deploy.cli", "serve", "--port", "0", "--http-port", "0", "--json"]
    command += ["--model", tiny_llama(), "--profile", folder, *options]
    said: list[str] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True) as process:
        try:
            facts = json.loads(process.stdout.readline())
            yield facts["address"], said
        finally:
            process.send_signal(signal.SIGTERM)
            said += process.communicate(timeout=60)
    assert process.returncode == 0, said[-1]


def complete(address: str, num_tokens: int) -> None:
    with SyncTandemClient(address) as client:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        response = client.generate("a prompt of some length, read in one step", sampling)
    assert len(response.completions[0].token_ids) == num_tokens


def events_of(folder: Path, worker: str) -> list[str]:
    trace = json.loads((folder / f"{worker}.trace.json").read_text())
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "tandem"]


def test_sigterm_writes_the_steps_there_were(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    with serving(folder, "--draft", "ngram") as (address, said):
        complete(address, 12)
    prefill, decode = events_of(folder, "prefill-0"), events_of(folder, "decode-0")
    assert prefill.count("prefill step") == 1
    assert {"prefill", "sample", "transfer out"} <= set(prefill)
    assert {"decode step", "draft", "verify", "accept"} <= set(decode)
    num_forwards = decode.count("verify") + decode.count("decode")  # plain where nothing is drafted
    assert 1 <= decode.count("decode step") == num_forwards <= 11
    assert "decode step: " in said[-1]
    assert "prefill-0: 1 steps" in said[-1]
    assert (folder / "decode-0.txt").read_text().rstrip() in said[-1]


def test_the_window_closes_after_so_many_steps_and_the_service_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path, "--draft", "none", "--profile-steps", 4) as (address, _):
        for _ in range(3):
            complete(address, 9)
    decode = events_of(tmp_path, "decode-0")
    assert decode.count("decode step") == decode.count("decode") == 4
    assert "transfer in" not in decode  # it came before the first step
    assert (tmp_path / "decode-0.txt").read_text().startswith("decode-0: 4 steps")


def test_a_service_nobody_asks_says_that_no_step_ran(tmp_path: Path) -> None:
    with serving(tmp_path, "--draft", "none") as (_, said):
        pass
    assert "decode-0: no step ran while the profile was taken" in said[-1]
    assert list(tmp_path.glob("*.json")) == []
