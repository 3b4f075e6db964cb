"""The peer in another process: its protocol, and what is said when it is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.inflate import BUNDLED
from bench.openvino.peer import OpenVino, Pipeline, running
from tandem.errors import ConfigError

ANSWERING = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    outputs = [[0] * request["max_tokens"]] * len(request["prompts"])
    print(json.dumps({"seconds": 2.0 / (1 + request["k"]), "outputs": outputs}), flush=True)
"""
PROMPTS = [(1, 2, 3), (4, 5, 6)]
PIPELINES = {"plain": Pipeline(BUNDLED.target)}


def child(code: str, errors) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=errors, text=True)


def test_seconds_and_outputs_come_from_the_answer(tmp_path) -> None:
    with (tmp_path / "errors").open("w+") as errors, child(ANSWERING, errors) as process:
        peer = OpenVino(process, errors)
        assert peer.complete("plain", PROMPTS, 8) == (2.0, [[0] * 8] * 2)
        assert peer.complete("plain", PROMPTS, 4, k=3, together=True) == (0.5, [[0] * 4] * 2)


def test_a_child_that_ends_says_why(tmp_path) -> None:
    with (
        (tmp_path / "errors").open("w+") as errors,
        child("raise SystemExit('no memory')", errors) as process,
        pytest.raises(ConfigError, match=r"no memory; it needs openvino-genai"),
    ):
        OpenVino(process, errors).complete("plain", PROMPTS, 8)


def test_a_python_without_openvino_is_refused_with_what_it_needs(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    missing = pytest.raises(ConfigError, match=r"No module named .*it needs openvino-genai")
    with missing, running(Path(sys.executable), PIPELINES, threads=1):
        pass
    assert list((tmp_path / "cache" / "openvino").iterdir()) == []


def test_a_python_that_is_not_there_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    with (
        pytest.raises(ConfigError, match="cannot convert"),
        running(tmp_path / "python", PIPELINES, threads=1),
    ):
        pass
