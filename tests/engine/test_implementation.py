"""What runs a checkpoint is settled once, before any worker starts, and is part of the model's name."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.config import CacheConfig, ClusterConfig, ModelConfig
from tandem.engine.implementation import settle
from tandem.errors import ConfigError
from tandem.fingerprint import model_fingerprint


def model(path, **changes):
    return ModelConfig(path=path, **changes)


def settled(path, cache=None, **changes):
    config = ClusterConfig(model=model(path, **changes), cache=cache or CacheConfig())
    return settle(config).model.implementation


def test_auto_becomes_what_runs_here(saved_model, monkeypatch):
    llama, gemma = saved_model("llama3")[1], saved_model("gemma2")[1]
    assert settled(llama) == "native"
    assert settled(llama, dtype="bfloat16") == "transformers"
    assert settled(gemma) == "transformers"
    assert settled(llama, implementation="lean") == "lean"
    assert settled(llama, CacheConfig(prefill_dtype="float16", decode_dtype="bfloat16")) == "native"
    monkeypatch.setenv("TANDEM_NATIVE", "off")
    assert settled(llama) == "lean"


def test_unlike_implementations_never_share_kv(saved_model):
    """Their sums differ in the last bits, so a pair of unlike workers would not be exact."""
    base = ClusterConfig(model=model(saved_model("llama3")[1]))
    names = [
        model_fingerprint(replace(base, model=replace(base.model, implementation=name)))
        for name in ("native", "lean", "transformers")
    ]
    assert len(set(names)) == 3


def test_an_unknown_name_is_refused(saved_model):
    with pytest.raises(ConfigError, match="must be one of auto, native, lean, transformers, not fast"):
        model(saved_model("llama3")[1], implementation="fast")


def test_settling_does_not_load_torch():
    """The command line settles it before it starts the workers."""
    code = "import sys, tandem.engine.implementation; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_a_device_that_is_no_cpu_takes_transformers_and_is_part_of_the_name(saved_model):
    llama = saved_model("llama3")[1]
    assert settled(llama, device="cuda:1") == "transformers"
    base = ClusterConfig(model=model(llama, implementation="transformers"))
    names = [
        model_fingerprint(replace(base, model=replace(base.model, device=device)))
        for device in ("cpu", "cuda", "cuda:1")
    ]
    assert names[0] != names[1] == names[2]
