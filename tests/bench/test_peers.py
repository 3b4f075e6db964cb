"""The comparison with others: its arithmetic by hand, its checkpoints, and a run at toy size."""

from __future__ import annotations

import json

import pytest

from bench import shapes
from bench.limits import Limits
from bench.measure import Spread
from bench.peers import run as peers
from bench.peers.arms import Phases, TransformersBatching
from bench.peers.run import Options, Row
from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry
from tests.bench.test_vllm_peer import python_with_vllm

TINY = shapes.Shape(2, 64, 4, 2, 96, 300)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    return shapes.checkpoint("tiny")


def test_a_shape_is_written_once(tiny, monkeypatch):
    geometry = ModelGeometry.from_path(tiny)
    assert (geometry.num_layers, geometry.hidden_size, geometry.vocab_size) == (2, 64, 300)
    monkeypatch.setattr(shapes, "_write", lambda *args: pytest.fail("written again"))
    assert shapes.checkpoint("tiny") == tiny


def test_an_unknown_shape_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="unknown shape 70b; known: raw, 111m, 1b"):
        shapes.checkpoint("70b")


def test_rates_and_ratios_by_hand():
    arms = {peers.BASE: lambda prompts: Phases(0.5, 2.0), "other": lambda prompts: Phases(1.0, 8.0)}
    base, other = peers._cell(arms, 100, 2, 300, 3)
    assert base.prefill_tokens_per_s.median == 400
    assert other.prefill_tokens_per_s.median == 200
    assert other.prefill_ratio.median == 2.0
    assert base.decode_tokens_per_s.median == 2 * 63 / 2.0
    assert other.decode_ratio.median == 4.0


def test_the_share_of_the_limits_by_hand(tiny):
    """A step reads linear weights in their format and the head in halves."""
    geometry, one = ModelGeometry.from_path(tiny), Spread(1.0, 1.0, 1.0)
    row = Row(128, 1, "Tandem int8", Spread(50.0, 50.0, 50.0), one, Spread(10.0, 10.0, 10.0), one)
    linear = geometry.num_parameters - 300 * 64
    [(prompt, name, decode, prefill)] = peers.shares([row], Limits(1e6, 1e9), geometry)
    assert (prompt, name) == (128, "int8")
    assert decode == pytest.approx(10 * (linear + 2 * 300 * 64) / 1e6)
    assert prefill == pytest.approx(2 * linear * 50 / 1e9)


def test_a_run_writes_every_system_of_every_cell(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "CELLS", {16: (1, 2)})
    monkeypatch.setattr(peers, "OUTPUT_TOKENS", 4)
    monkeypatch.setattr(peers, "limits", lambda threads: Limits(1e9, 1e9))
    missing, profile = tmp_path / "python", tmp_path / "profile"
    peers.run(Options("tiny", 1, 1, missing, tmp_path / "out", missing, profile), as_json=False)
    document = json.loads((tmp_path / "out" / "peers.json").read_text())
    systems = ["Tandem fp16", "Tandem bf16", "Tandem int8", "Tandem int8-a8", "Tandem nf4"]
    systems += ["transformers fp32", "transformers generate_batch fp32"]
    assert [(row["batch"], row["system"]) for row in document["rows"]] == [
        (b, s) for b in (1, 2) for s in systems
    ]
    assert "cannot convert" in document["skipped"][0]
    assert "vLLM did not start" in document["skipped"][1]
    assert "Tandem and the limits" in capsys.readouterr().out
    assert "quantize activations" in (profile / "tandem-nf4-16.txt").read_text()
    assert (profile / "tandem-fp16-16.trace.json").exists()


def test_generate_batch_brings_every_token(tiny, monkeypatch):
    arm, brought = TransformersBatching(tiny, 5), []
    generate_batch = arm._model.generate_batch

    def spy(*args, **options):
        found = generate_batch(*args, **options)
        brought.extend(len(each.generated_tokens) for each in found.values())

    monkeypatch.setattr(arm._model, "generate_batch", spy)
    phases = arm([tuple(range(3, 40)), tuple(range(50, 87))])
    assert brought == [1, 1, 5, 5]
    assert phases.prefill_s > 0


def test_vllm_is_one_more_system_where_a_python_has_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CELLS", {16: (1, 2)})
    monkeypatch.setattr(peers, "OUTPUT_TOKENS", 4)
    monkeypatch.setattr(peers, "limits", lambda threads: Limits(1e9, 1e9))
    options = Options("tiny", 1, 1, None, tmp_path / "out", vllm_python=python_with_vllm(tmp_path))
    document = peers.run(options, as_json=True)
    assert [row["batch"] for row in document["rows"] if row["system"] == "vLLM fp32"] == [1, 2]
    assert document["skipped"] == []
