"""The GPU benchmark on a CPU, at toy size: the same code but for CUDA."""

from __future__ import annotations

import json

import pytest
import torch

from bench.gpu import run
from bench.gpu.model import RandomModel
from tandem.errors import ConfigError

NUM_TOKENS = 9
PROMPTS = [tuple(range(3, 40)), tuple(range(50, 87))]


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel("tiny", "cpu", 2, 64)


def test_both_sides_compute_the_same_tokens(model):
    """In float32, where nothing is rounded enough to change a choice: so both do the same work."""
    _, _, ours = model.ours(PROMPTS, NUM_TOKENS)
    _, _, theirs = model.theirs(PROMPTS, NUM_TOKENS)
    assert ours == theirs
    assert [len(output) for output in ours] == [NUM_TOKENS] * 2
    assert model.ours(PROMPTS, NUM_TOKENS)[2] == ours


def test_a_step_reads_all_linear_weights_once(model):
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    assert model.step_bytes == 4 * (2 * layer + 300 * 64)


def test_rates_and_shares_by_hand(model, monkeypatch):
    monkeypatch.setattr(run, "PROMPT_TOKENS", 10)
    monkeypatch.setattr(run, "OUTPUT_TOKENS", 5)
    ours, theirs = [(0.5, 2.0, [(1,) * 5, (2,) * 5])], [(1.0, 8.0, [(1,) * 5, (2, 2, 2, 2, 3)])]
    row = run._row("tiny", model, ours, theirs, bandwidth=1e6)
    assert (row.prefill_tokens_per_s.median, row.prefill_ratio.median) == (40.0, 2.0)
    assert (row.decode_tokens_per_s.median, row.decode_ratio.median) == (4.0, 4.0)
    kv = 2 * 12.5 * model.geometry.kv_bytes_per_token("float32")
    assert row.bandwidth_share == pytest.approx((model.step_bytes + kv) * 2 / 1e6)  # two steps a second
    assert row.same_tokens == pytest.approx(0.9)


def test_a_run_writes_a_table_and_json(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "BATCHES", (1, 2))
    monkeypatch.setattr(run, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(run, "OUTPUT_TOKENS", 6)
    text = run.run(run.Options("cpu", ("tiny",), 2, tmp_path))
    assert (tmp_path / "gpu.md").read_text() == text
    assert text.count("| tiny |") == 2
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["batch"], row["same_tokens"]) for row in document["rows"]] == [(1, 1.0), (2, 1.0)]
    assert document["copy_bytes_per_s"] > 1e6


def test_a_shape_that_memory_has_no_room_for_is_said(tmp_path, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(run, "RandomModel", out_of_memory)
    text = run.run(run.Options("cpu", ("8b",), 1, tmp_path))
    assert "Not measured: 8b: CUDA out of memory." in text


@pytest.mark.parametrize(
    ("device", "message"), [("tpu", "cuda or cpu"), ("cuda", "torch finds no GPU")], ids=["other", "absent"]
)
def test_a_device_that_there_is_not_is_refused(device, message, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        run.run(run.Options(device, ("tiny",), 1, tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_tiny_shape_runs_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "BATCHES", (1, 2))
    assert "| tiny |" in run.run(run.Options("cuda", ("tiny",), 1, tmp_path))
