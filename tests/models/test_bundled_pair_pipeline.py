"""The code that makes the pair runs through all its stages, here with toy sizes on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from bench.bundled_pair import __main__ as pipeline
from bench.bundled_pair import evaluate
from bench.bundled_pair.corpus import SourceFile, archive, save_archive, standard_library
from bench.bundled_pair.distill import DraftPlan
from bench.bundled_pair.model import Shape
from bench.bundled_pair.training import Plan
from bench.bundled_pair.unloop import UnloopPlan

TOKENIZER = Path(__file__).resolve().parents[2] / "tandem" / "models" / "target" / "tokenizer.json"
TOY = Shape(hidden=64, layers=2, heads=2, kv_heads=1, ffn=64, context=128)
MODULES = {"train": ("bisect.py", "queue.py"), "heldout": ("selectors.py",), "heldout_tests": ("sched.py",)}
ROWS = {"rows": 8, "length": 64}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of all stages but the corpus, over a few modules."""
    work = tmp_path / "work"
    for name, paths in MODULES.items():
        files = [SourceFile(path, (standard_library() / path).read_text()[:6000]) for path in paths]
        save_archive(work, name, archive(Tokenizer.from_file(str(TOKENIZER)), files))
    (work / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    (work / "heldout.txt").write_text("selectors.py\nsched.py\n")
    monkeypatch.setattr(pipeline, "TARGET", TOY)
    monkeypatch.setattr(pipeline, "DRAFT", TOY)
    monkeypatch.setattr(pipeline, "Plan", lambda **given: Plan(**given, **ROWS))
    monkeypatch.setattr(
        pipeline,
        "UnloopPlan",
        lambda **given: UnloopPlan(**given, **ROWS, own_rows=4, own_prompt=16, own_steps=64, refresh=2),
    )
    monkeypatch.setattr(
        pipeline, "DraftPlan", lambda **given: DraftPlan(**given, **ROWS, pool_steps=32, pool_prompt=8)
    )
    monkeypatch.setattr(evaluate, "PROMPT_ROWS", 4)
    monkeypatch.setattr(evaluate, "NEW_TOKENS", 64)
    monkeypatch.setattr(evaluate, "PROMPT_TOKENS", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    yield pipeline.Run(pipeline.STAGES[1:], work, tmp_path / "out", device, 0.004, float("inf"), 0)
    torch.set_num_threads(before)


@pytest.mark.slow
def test_target_draft_and_figures_come_out(run, capsys):
    pipeline.make_target(run)
    pipeline.make_draft(run)
    pipeline.measure(run)
    figures = json.loads((run.out / "figures.json").read_text())
    assert figures["held_out_library"]["target_nats"] < 8.0  # chance is 8.3
    assert 0 <= figures["along_greedy_output"]["accepted_of_3"] <= 3
    assert json.loads((run.work / "target.json").read_text())["fp16_largest_logit_change"] < 0.1
    assert (run.out / "heldout.txt").read_text() == "selectors.py\nsched.py\n"
    assert "unloop step" in capsys.readouterr().out
