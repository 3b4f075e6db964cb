"""vLLM in another process: what it is asked for, and what is said when it is not there.

The package here is a stand-in with the names and arguments of the real one's interface, and fails for others.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.vllm.peer import Settings, running
from tandem.errors import ConfigError

PROMPTS = [(1, 2, 3), (4, 5, 6)]
SETTINGS = Settings("checkpoint", threads=1, max_sequences=2, max_tokens=16)
STAND_IN = """
import os, pathlib, sys
from dataclasses import dataclass

print("what a library prints on its way")
log = pathlib.Path(__file__).with_name("calls.txt").open("a")

@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    detokenize: bool = True

@dataclass
class CompletionOutput:
    index: int
    token_ids: list[int]

@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

class LLM:
    def __init__(self, model, *, skip_tokenizer_init=False, dtype="auto", seed=0, max_model_len=None,
                 max_num_seqs=None, enable_prefix_caching=None):
        if model == "broken":
            raise ValueError("no such model")
        environment = [os.environ[name] for name in ("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE")]
        print(model, dtype, max_model_len, max_num_seqs, enable_prefix_caching, *environment, file=log,
              flush=True)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert not use_tqdm and not sampling_params.detokenize
        assert sampling_params.ignore_eos and sampling_params.temperature == 0
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        count = sampling_params.max_tokens
        return [RequestOutput(i, [CompletionOutput(0, [sum(i)] * count)]) for i in ids]
"""


def python_with_vllm(folder: Path) -> Path:
    """An interpreter that finds the stand-in; `-I` is its first argument, and would hide it."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text(STAND_IN)
    python = folder / "python-with-vllm"
    python.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_all_prompts_go_at_once_with_the_settings_asked_for(tmp_path) -> None:
    with running(python_with_vllm(tmp_path), SETTINGS) as peer:
        seconds, outputs = peer.complete(PROMPTS, 3)
        assert seconds >= 0
        assert outputs == [[6] * 3, [15] * 3]
        assert peer.complete(PROMPTS[:1], 1)[1] == [[6]]
    [loaded] = (tmp_path / "vllm" / "calls.txt").read_text().splitlines()
    assert loaded == "checkpoint float32 16 2 False 1 2"


def test_an_engine_that_does_not_load_says_why(tmp_path) -> None:
    settings = Settings("broken", threads=1, max_sequences=2, max_tokens=16)
    refused = pytest.raises(ConfigError, match=r"vLLM ended: ValueError: no such model; it needs vllm")
    with running(python_with_vllm(tmp_path), settings) as peer, refused:
        peer.complete(PROMPTS, 3)


def test_a_python_without_vllm_is_refused_with_what_it_needs() -> None:
    missing = pytest.raises(ConfigError, match=r"No module named 'vllm'; it needs vllm")
    with running(Path(sys.executable), SETTINGS) as peer, missing:
        peer.complete(PROMPTS, 3)


def test_a_python_that_is_not_there_is_refused(tmp_path) -> None:
    refused = pytest.raises(ConfigError, match=r"vLLM did not start: .*No such file")
    with refused, running(tmp_path / "python", SETTINGS):
        pass
