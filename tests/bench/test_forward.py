"""The cost of a forward: its arithmetic by hand, its cells on a tiny model, a whole run with its files."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import shapes
from bench.forward import cells, report, run
from bench.forward.cells import Cell, Skipped
from bench.forward.reference import Reference
from bench.forward.results import Options
from bench.forward.rig import Rig
from bench.forward.traffic import Traffic, slope
from bench.limits import Limits
from bench.measure import Meter
from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry

TINY = shapes.Shape(2, 64, 4, 2, 96, 300)
LIMITS = Limits(bytes_per_s=1e9, flops=1e10)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Its checkpoint in a folder of its own; kernels stay where they are, compiled."""
    monkeypatch.setattr(shapes, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    return shapes.checkpoint("tiny")


def test_work_by_hand(tiny):
    """2 layers of 4 heads and 2 KV heads of 16: 512 bytes of fp32 KV per token, 128 numbers per query."""
    geometry = ModelGeometry.from_path(tiny)
    traffic, weights, head = Traffic(geometry, 2, "float32"), geometry.num_parameters, 300 * 64
    step = traffic.decode(3, 9)
    assert step.num_bytes == 2 * weights + 512 * 3 * 10
    assert step.num_flops == 2 * 3 * weights + 4 * 128 * 3 * 10
    prompt = traffic.prefill(5)
    assert prompt.num_bytes == 2 * weights + 512 * 5
    assert prompt.num_flops == 2 * (5 * (weights - head) + head) + 4 * 128 * (1 + 2 + 3 + 4 + 5)
    assert traffic.prefill(5, 3).num_flops == 3 * prompt.num_flops
    assert traffic.prefill(5, 3).num_bytes == 2 * weights + 512 * 15
    assert step.memory_share(1e-3, LIMITS) == pytest.approx(step.num_bytes / 1e6)
    assert step.arithmetic_share(1e-3, LIMITS) == pytest.approx(step.num_flops / 1e7)


@given(st.floats(1e-9, 1e-3), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_the_slope_is_found_whatever_a_batch_costs_without_context(true, bases):
    steps = [
        (batch, context, base + true * batch * context)
        for batch, base in zip((1, 4, 16), bases, strict=True)
        for context in (16, 256, 4096)
    ]
    found = slope(steps, 512, LIMITS)
    assert found.seconds_per_token == pytest.approx(true, rel=1e-4)
    assert found.over_limit == pytest.approx(true / 512e-9, rel=1e-4)


def test_one_context_per_batch_has_no_slope():
    assert slope([(1, 16, 0.1), (2, 16, 0.2)], 512, LIMITS) is None


def test_what_does_not_fit_is_said_and_the_rest_is_measured(tiny):
    rig = Rig(tiny, "cpu", 64)
    wanted = [Cell("decode", 2, 16), Cell("decode", 2, 64), Cell("prefill", 1, 64), Cell("prefill", 2, 33)]
    with Meter("forward", 10) as meter:
        timings, skipped = cells.measure(rig, wanted, 1, 1 << 30, meter)
        assert [timing.cell for timing in timings] == [wanted[0], wanted[2]]
        assert [skip.cell for skip in skipped] == [wanted[1], wanted[3]]
        assert all("GiB of KV are more than the cache has" in skip.why for skip in skipped)
        timings, [skip] = cells.measure(rig, [wanted[2]], 1, 1000, meter)
    assert not timings
    assert "its rows need" in skip.why


def test_a_cell_that_runs_out_of_memory_is_noted(tiny, monkeypatch):
    import torch

    def refuse(self, num_tokens, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Rig, "prefill", refuse)
    with Meter("forward", 10) as meter:
        timings, skipped = cells.measure(
            Rig(tiny, "cpu", 64), [Cell("prefill", 1, 8), Cell("decode", 1, 8)], 1, 1 << 30, meter
        )
    assert [timing.cell.phase for timing in timings] == ["decode"]
    assert skipped == [Skipped(Cell("prefill", 1, 8), "out of memory: CUDA out of memory")]


def test_a_forward_reads_numbers_that_were_written(tiny):
    """An untouched cache is one page of zeros, which costs nothing to read."""
    cache = Rig(tiny, "cpu", 1000).runner.cache
    blocks = cache.read_blocks(range(cache.num_blocks))
    assert (blocks != 0).float().mean() > 0.99
    assert blocks.isfinite().all()


def test_outputs_are_prefix_sums_and_recompute_does_every_token_again(tiny, monkeypatch):
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(Rig, "prefill", lambda self, n: calls.append(("prefill", n)) or 1.0)
    monkeypatch.setattr(Rig, "decode", lambda self, b, n: calls.append(("decode", n)) or 0.25)
    monkeypatch.setattr(cells, "OUTPUTS", (1, 2, 4))
    rig = Rig(tiny, "cpu", 64)
    kept = list(cells._follow(rig.with_cache, 8, True))
    assert [(o.output_tokens, o.seconds) for o in kept] == [(1, 1.0), (2, 1.25), (4, 1.75)]
    assert calls == [("prefill", 8), ("decode", 8), ("decode", 9), ("decode", 10)]
    calls.clear()
    again = list(cells._follow(rig.without_cache, 8, False))
    assert [(o.output_tokens, o.seconds) for o in again] == [(1, 1.0), (2, 2.0), (4, 4.0)]
    assert calls == [("prefill", 8), ("prefill", 9), ("prefill", 10), ("prefill", 11)]
    monkeypatch.setattr(cells, "PATIENCE_S", 0.0)
    assert [o.output_tokens for o in cells._follow(rig.without_cache, 8, False)] == [1]


def test_a_step_of_transformers_leaves_its_cache_as_long_as_it_was(tiny):
    reference = Reference(tiny, "cpu", "float32")
    assert all(reference.decode(2, 9) > 0 for _ in range(3))
    assert reference._caches[2, 9].get_seq_length() == 9


@pytest.mark.parametrize(
    ("device", "message"), [("tpu", "cpu or cuda"), ("cuda", "torch finds no GPU")], ids=["other", "absent"]
)
def test_a_device_that_there_is_not_is_refused(device, message, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        run.run(Options("raw", False, 1, 1, device, tmp_path, plots=False), as_json=False)


def test_a_run_writes_tables_plots_and_the_slope(tiny, tmp_path, monkeypatch, capsys):
    for name, value in {
        "BATCHES": (1, 2),
        "CONTEXTS": (16, 64),
        "PROMPTS": (1, 8, 32),
        "SLOW_PROMPT": 8,
        "OUTPUTS": (1, 2, 4),
        "LONG": 32,
        "PEER_STEPS": ((2, 16),),
        "PEER_PROMPTS": (8,),
        "PROFILED": (cells.Cell("decode", 2, 16), cells.Cell("prefill", 1, 32)),
    }.items():
        monkeypatch.setattr(cells, name, value)
    monkeypatch.setattr(run, "limits", lambda threads, device: LIMITS)
    out, profile = tmp_path / "out", tmp_path / "profile"
    run.run(Options("tiny", False, 1, 1, "cpu", out, profile=profile), as_json=False)
    document = json.loads((out / "forward.json").read_text())
    assert [(row["phase"], row["batch"], row["tokens"]) for row in document["rows"]] == [
        *(("decode", batch, context) for context in (16, 64) for batch in (1, 2)),
        *(("prefill", 1, length) for length in (1, 8, 32)),
    ]
    first = document["rows"][0]
    assert first["memory_share"] == pytest.approx(first["bytes"] / 1e9 / first["seconds"])
    assert document["slope"]["limit_s"] == pytest.approx(512e-9)
    assert len(document["outputs"]) == 2 * 2 * 3
    assert [row["phase"] for row in document["beside"]] == ["decode", "prefill"]
    assert not document["skipped"]
    with (out / "forward.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"])
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in ("decode.png", "prefill.png"))
    text = (out / "forward.md").read_text()
    assert "Slope of a decode step" in text
    assert all(f"## {title}" in text for title in ("decode step", "prefill", "beside transformers, eager"))
    assert report.GOAL == 1.3
    step = (profile / "decode-batch-2-tokens-16.txt").read_text()
    assert step.startswith(f"decode-batch-2-tokens-16: {cells.PROFILED_STEPS} steps")
    assert "attention" in step
    assert (profile / "prefill-batch-1-tokens-32.trace.json").exists()
    assert "Slope of a decode step" in capsys.readouterr().out
