"""The table of a profile and the events of its trace, by hand."""

from __future__ import annotations

import json

import pytest

from tandem.profiling import summary, trace
from tandem.profiling.recording import Span
from tandem.profiling.summary import Profile
from tandem.profiling.trace import Totals

MS = 1_000_000
PARTS = ("linears", "attention", "dequantize")
NO_TORCH = Totals({}, 0, 0.0, 0.0)


def profile(*spans: Span, beside: tuple[Span, ...] = (), totals: Totals = NO_TORCH) -> Profile:
    return Profile("decode-0", "native", spans, beside, 0, PARTS, frozenset({"dequantize"}), totals)


STEPS = (
    Span("draft", 1, 0, 2 * MS, (0.5 * MS, 0.5 * MS, 0.0)),
    Span("inner", 2, 3 * MS, 4 * MS, (0.0, 0.0, 0.0)),
    Span("verify", 1, 2 * MS, 8 * MS, (4.0 * MS, 1.0 * MS, 3.0 * MS)),
    Span("step", 0, 0, 9 * MS, (4.5 * MS, 1.5 * MS, 3.0 * MS)),
    Span("verify", 1, 10 * MS, 11 * MS, (0.0, 0.0, 0.0)),
    Span("step", 0, 10 * MS, 11 * MS, (0.0, 0.0, 0.0)),
    Span("prefill", 1, 12 * MS, 13 * MS, (0.0, 0.0, 0.0)),
    Span("prompt", 0, 12 * MS, 14 * MS, (0.0, 0.0, 0.0)),
)


def test_spans_right_within_a_step_share_it_and_the_rest_is_python():
    rows = {(line.name, line.indent): line for line in summary.lines(profile(*STEPS), "step")}
    assert rows["draft", 0].ms == pytest.approx(1.0)  # 2 ms over two steps
    assert rows["draft", 0].times == pytest.approx(0.5)
    assert rows["verify", 0].ms == pytest.approx(3.5)
    assert rows["verify", 0].share == pytest.approx(0.7)
    assert rows["Python", 0].ms == pytest.approx(0.5)
    tops = [line for line in rows.values() if not line.indent]
    assert sum(line.share for line in tops) == pytest.approx(1.0)


def test_counters_divide_a_span_and_dequantization_is_told_from_the_product():
    lines = list(summary.lines(profile(*STEPS), "step"))
    first = next(i for i, line in enumerate(lines) if line.name == "verify")
    verify = {line.name: line.ms for line in lines[first + 1 :] if line.indent}
    assert verify["linears"] == pytest.approx(0.5)  # 4 - 3 ms, over two steps
    assert verify["dequantize"] == pytest.approx(1.5)
    assert verify["attention"] == pytest.approx(0.5)
    assert verify["Python around the kernels"] == pytest.approx(1.0)  # 7 - 5 ms
    assert sum(verify.values()) == pytest.approx(lines[first].ms)


def test_a_step_without_spans_shows_its_counters():
    step = Span("forward", 0, 0, 4 * MS, (2.0 * MS, 1.0 * MS, 0.0))
    found = {line.name: line.ms for line in summary.lines(profile(step), "forward")}
    assert found == pytest.approx({"linears": 2.0, "attention": 1.0, "Python around the kernels": 1.0})


def test_the_text_says_what_there_was():
    beside = (Span("transfer in", 0, 0, 2 * MS), Span("transfer in", 0, 0, 4 * MS))
    totals = Totals({"aten::mm": (6, 3.0 * MS)}, 30, 12.0 * MS, 6.0 * MS)
    text = summary.text(profile(*STEPS, beside=beside, totals=totals))
    assert text.startswith("decode-0: 3 steps, 12.0 ms of 14.0 ms\n")
    assert "step: 2 of 5.000 ms" in text
    assert "prompt: 1 of 2.000 ms" in text
    assert "torch: 2.0 calls a step, 1.000 ms" in text
    assert "10.0 launches a step, 4.000 ms in kernels, 2.000 ms of it dequantization" in text
    assert "transfer in, beside the steps: 2 times, 3.00 ms each, 4.00 at most" in text


def test_without_a_step_the_text_says_so():
    assert summary.text(profile()) == "decode-0: no step ran while the profile was taken\n"


def event(name: str, ts: float, dur: float, cat: str = "cpu_op", tid: int = 7) -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "pid": 1}


def test_a_call_is_not_charged_for_calls_within_it():
    events = [
        event("linear", 0, 10),
        event("mm", 1, 6),
        event("copy", 2, 1),
        event("mm", 20, 5),
        event("linear", 3, 4, tid=8),
    ]
    found = trace.totals(events)
    assert found.calls == {"linear": (2, 8e3), "mm": (2, 10e3), "copy": (1, 1e3)}
    assert found.num_launches == 0


def test_launches_and_dequantization_are_told_from_other_kernels():
    events = [
        event("cudaLaunchKernel", 0, 1, cat="cuda_runtime"),
        event("cuLaunchKernelEx", 0, 1, cat="cuda_driver"),
        event("cudaMemcpyAsync", 0, 1, cat="cuda_runtime"),
        event("kDequantizeBlockwise<half>", 5, 3, cat="kernel"),
        event("gemm", 9, 4, cat="kernel"),
    ]
    assert trace.totals(events) == Totals({}, 2, 7e3, 3e3)


def test_a_trace_has_our_spans_on_torchs_clock(tmp_path):
    torch_trace = {"baseTimeNanoseconds": 5 * MS, "traceEvents": [event("mm", 1, 2)], "schemaVersion": 1}
    path = tmp_path / "decode-0.trace.json"
    beside = [Span("transfer in", 0, 6 * MS, 9 * MS)]
    trace.write(path, torch_trace, 42, [Span("verify", 1, 7 * MS, 8 * MS, (MS, 0, 0))], beside, PARTS)
    written = json.loads(path.read_text())
    [verify] = [e for e in written["traceEvents"] if e["name"] == "verify"]
    assert (verify["ts"], verify["dur"], verify["pid"]) == (2000, 1000, 42)
    assert verify["args"] == {"linears, ms": 1.0}
    began, ended = (e for e in written["traceEvents"] if e["name"] == "transfer in")
    assert (began["ph"], began["ts"], ended["ph"], ended["ts"]) == ("b", 1000, "e", 4000)
    assert began["id"] == ended["id"]
    assert written["traceEvents"][0]["name"] == "mm"
