"""A profile of real forwards: its files, its clock, its counters, and that it changes no token."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from tandem.config import ProfileConfig
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.engine.native import build
from tandem.engine.native.clock import PARTS, WITHIN_LINEARS, Clock
from tandem.engine.profiler import Profiler, profiled
from tandem.errors import ConfigError
from tandem.profiling.spans import span, steps
from tests.checkpoints import tiny_llama

ROWS = SequenceRows(list(range(3, 60)), 0, range(4))
SLACK_US = 200.0  # by which two clocks may differ


def load(**options) -> ModelRunner:
    return ModelRunner.load(tiny_llama(), num_blocks=8, block_size=16, **options)


def counted(model: ModelRunner) -> dict[str, float]:
    """Nanoseconds of a forward, part by part."""
    clock = Clock(build.instruction_set())
    clock.start()
    before = clock.read()
    for _ in range(20):
        model.choose([ROWS])
    clock.stop()
    after = clock.read()
    return {name: now - then for name, then, now in zip(PARTS, before, after, strict=True)}


def test_the_clock_counts_only_while_it_runs():
    model, clock = load(), Clock(build.instruction_set())
    assert sum(counted(model).values()) > 0
    before = clock.read()
    model.choose([ROWS])
    assert clock.read() == before


@pytest.mark.parametrize(
    ("quantization", "bits", "within"),
    [
        ("none", 32, set()),
        ("nf4", 16, {"quantize activations"}),
        ("nf4", 8, {"quantize activations"}),
        ("int8", 8, {"quantize activations"}),
    ],
)
def test_the_work_of_a_quantization_is_told_from_the_product(quantization, bits, within):
    found = counted(load(quantization=quantization, activation_bits=bits))
    assert {name for name in WITHIN_LINEARS if found[name]} == within
    assert sum(found[name] for name in within) < found["linears"]
    assert all(found[name] > 0 for name in ("embedding", "norms", "attention", "activation", "head"))


def test_guesses_count_their_choices():
    model, clock = load(), Clock(build.instruction_set())
    clock.start()
    before = clock.read()
    model.guess([ROWS], [4], [0.0])
    clock.stop()
    index = PARTS.index("choosing tokens")
    assert clock.read()[index] > before[index]


def run_profiled(tmp_path, model: ModelRunner, name: str, num_steps: int = 3) -> tuple[list[int], dict]:
    tokens = []
    with profiled(ProfileConfig(dir=tmp_path, steps=num_steps), name, "what runs", is_native=True):
        for _ in range(5):
            with span("step"):
                torch.ones(300, 300) @ torch.ones(300, 300)
                tokens += model.choose([ROWS])
    return tokens, json.loads((tmp_path / f"{name}.trace.json").read_text())


def test_a_profile_changes_no_token_and_holds_as_many_steps_as_asked_for(tmp_path):
    model = load().called("verify")
    expected = model.choose([ROWS]) * 5
    tokens, trace = run_profiled(tmp_path, model, "decode-0")
    assert tokens == expected
    assert [e["name"] for e in trace["traceEvents"] if e.get("cat") == "tandem"] == ["verify", "step"] * 3
    text = (tmp_path / "decode-0.txt").read_text()
    assert text.startswith("decode-0: 3 steps")
    for word in ("what runs", "step: 3 of", "verify", "linears", "attention", "Python", "aten::mm"):
        assert word in text


def test_our_spans_and_torchs_calls_share_a_clock(tmp_path):
    _, trace = run_profiled(tmp_path, load(), "decode-0")
    named = [e for e in trace["traceEvents"] if e["name"] in ("step", "aten::mm") and e["ph"] == "X"]
    spans = {name: [e for e in named if e["name"] == name] for name in ("step", "aten::mm")}
    assert len(spans["step"]) == len(spans["aten::mm"]) == 3
    for step, product in zip(*spans.values(), strict=True):
        assert step["ts"] - SLACK_US <= product["ts"]
        assert product["ts"] + product["dur"] <= step["ts"] + step["dur"] + SLACK_US


def test_counters_are_within_the_span_they_belong_to(tmp_path):
    _, trace = run_profiled(tmp_path, load().called("verify"), "decode-0")
    for event in (e for e in trace["traceEvents"] if e["name"] == "verify"):
        parts = {name.removesuffix(", ms"): ms for name, ms in event["args"].items()}
        counted_ms = sum(ms for name, ms in parts.items() if name not in WITHIN_LINEARS)
        assert 0 < counted_ms <= event["dur"] / 1e3 * 1.05  # two clocks


def test_the_end_of_the_computing_thread_writes_what_there_is(tmp_path):
    work = iter([True, True, False])
    profiler = Profiler(ProfileConfig(dir=tmp_path, steps=100), "prefill-0", "what runs", is_native=False)
    thread = threading.Thread(target=lambda: list(steps("prefill step", lambda: next(work))))
    thread.start()
    thread.join()
    profiler.close()
    assert (tmp_path / "prefill-0.txt").read_text().startswith("prefill-0: 2 steps")


def test_a_process_without_steps_says_so(tmp_path):
    with profiled(ProfileConfig(dir=tmp_path / "new"), "prefill-0", "what runs", is_native=False):
        pass
    assert (tmp_path / "new" / "prefill-0.txt").read_text() == (
        "prefill-0: no step ran while the profile was taken\n"
    )
    assert not (tmp_path / "new" / "prefill-0.trace.json").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"profiles go to a folder, and .* is a file"):
        ProfileConfig(dir=tmp_path / "file")
    with pytest.raises(ConfigError, match="steps must be more than 0"):
        ProfileConfig(dir=tmp_path, steps=0)
