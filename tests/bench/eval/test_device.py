"""Experiments on a GPU: where none is, on a device that only pretends to be another one, and without NVML."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bench.eval import decoding, gamma, samples, split, utilization
from bench.eval.decoding import Arm, measure
from bench.eval.experiment import Settings
from bench.eval.perplexity import read
from bench.speculation.rig import Rig, Setup
from deploy.commands import eval as commands
from deploy.eval_app import GPU_SAMPLES, SAMPLES, experiments
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tests.bench.eval.test_decoding import GREEDY, PROMPTS
from tests.checkpoints import tiny_llama
from tests.engine.pretend_device import DEVICE, pretended


@pytest.fixture
def nvml(monkeypatch) -> list[str]:
    """A driver that finds a GPU busy for three quarters of the time, and remembers which it was asked for."""
    asked: list[str] = []

    def share(device: str) -> int:
        asked.append(device)
        return 75

    monkeypatch.setattr(torch.cuda, "utilization", share)
    return asked


@pytest.fixture
def anywhere(monkeypatch) -> None:
    """Settings that take any device, and compute in float32 on all of them."""
    monkeypatch.setattr("bench.speculation.rig.ModelConfig", _unchecked)
    monkeypatch.setattr("tandem.engine.loading.check_device", lambda name: None)
    monkeypatch.setattr("bench.speculation.rig.dtype_on", lambda device: "float32")


def test_utilization_is_that_of_the_device_that_decodes(nvml) -> None:
    result, share = utilization.watched(lambda: time.sleep(0.2) or "done", "cuda:1", 2)
    assert (result, share, set(nvml)) == ("done", 0.75, {"cuda:1"})
    assert len(nvml) >= 3
    before = len(nvml)
    _, share = utilization.watched(lambda: time.sleep(0.2), "cpu", 2)
    assert share < 0.5
    _, share = utilization.watched(lambda: sum(range(10_000_000)), "cpu", 2)
    assert 0.1 < share < 0.6  # one thread of two, on a busy machine
    assert len(nvml) == before


def test_the_watch_ends_with_what_it_watches(nvml) -> None:
    def fail() -> None:
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        utilization.watched(fail, "cuda", 1)
    looks = len(nvml)
    time.sleep(0.15)
    assert len(nvml) == looks


def test_a_gpu_that_cannot_be_watched_is_refused_before_anything_runs(monkeypatch) -> None:
    def missing(device: str) -> int:
        raise ModuleNotFoundError("pynvml")

    def unsupported(device: str) -> int:
        raise RuntimeError("Not Supported")

    utilization.check("cpu")
    monkeypatch.setattr(torch.cuda, "utilization", missing)
    with pytest.raises(ConfigError, match="pip install nvidia-ml-py"):
        utilization.check("cuda")
    monkeypatch.setattr(torch.cuda, "utilization", unsupported)
    with pytest.raises(ConfigError, match="no utilization of cuda:1: Not Supported"):
        utilization.check("cuda:1")


def test_arms_decode_on_the_device(pair, nvml, anywhere) -> None:
    """A pretended one: same tokens as here, and its utilization is the driver's."""
    here = Rig(pair, Setup(), 3, 40, 1)
    with pretended():
        there = Rig(pair, Setup(), 3, 40, 1, str(DEVICE))
        assert there.engine.model.device == there.engine.draft.device == DEVICE
        arms = {(rig, k): Arm.of(rig, k, 0.0) for rig in (here, there) for k in (0, 3)}
        found = measure(arms, PROMPTS, 1, GREEDY, 2, lambda: None)
    plain = found[here, 0].total.outputs
    assert all(outcome.total.outputs == plain for outcome in found.values())
    assert found[there, 3].total.num_accepted == found[here, 3].total.num_accepted
    assert found[there, 0].utilization == found[there, 3].utilization == pytest.approx(0.75)
    assert set(nvml) == {str(DEVICE)}


def test_a_whole_experiment_runs_there(settings, nvml, anywhere, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "OUTPUT_TOKENS", 6)  # too few to tell a loop by
    monkeypatch.setattr(samples, "by_looping", lambda texts, prompt_tokens: (texts, []))
    monkeypatch.setattr(gamma, "GAMMAS", (2,))
    monkeypatch.setattr(gamma, "CANDIDATES", (2,))
    with pretended():
        found = gamma.run(replace(settings, device=str(DEVICE)))
    assert {row.samples for row in found.tables["rows"]} == {2}
    assert not any("Not measured" in remark for remark in found.remarks)


def test_perplexity_is_read_on_the_device() -> None:
    tokens = [(5 * i * i + i) % 250 for i in range(600)]
    here = read(ModelRunner.load(tiny_llama(), num_blocks=32, block_size=16), tokens)
    with pretended():
        model = ModelRunner.load(tiny_llama(), num_blocks=32, block_size=16, device=DEVICE)
        there = read(model, tokens)
        assert there.perplexity == pytest.approx(here.perplexity, rel=1e-5)
        assert there.agreement(here) == 1


def test_split_and_unsplit_share_cores_only() -> None:
    with pytest.raises(ConfigError, match="share out the CPU's cores, not cuda"):
        split.run(Settings(device="cuda"))


@pytest.mark.parametrize(("device", "count"), [("cpu", SAMPLES), ("cuda", GPU_SAMPLES)])
def test_as_many_samples_as_the_device_has_speed_for(monkeypatch, device, count) -> None:
    ran = []
    monkeypatch.setattr(commands, "run", lambda name, params, *rest: ran.append(params))
    done = CliRunner().invoke(experiments, ["speculation", "--device", device])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(experiments, ["speculation", "--device", device, "--samples", "7"])
    assert done.exit_code == 0, done.output
    assert [params["samples"] for params in ran] == [count, 7]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    for device, why in (("cuda", "finds no GPUs here"), ("gpu", "must be cpu, cuda or cuda:0")):
        params = {"device": device, "log": None}
        with pytest.raises(ConfigError, match=why):
            commands.settings_of(params)


def _unchecked(**values):
    """A `ModelConfig` on a device that settings do not know."""
    from tandem.config_model import ModelConfig

    made = ModelConfig(**{**values, "device": "cpu"})
    object.__setattr__(made, "device", values["device"])
    return made
