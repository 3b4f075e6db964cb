"""A trace file as Chrome and Perfetto read it: torch's events, and tracks of our own beside them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tandem.profiling.recording import Span

STEPS = 1  # the track's number; those of torch are the system's numbers of threads
NS_PER_US = 1_000
DEQUANTIZATION = "dequant"  # in the name of a kernel that does it


class Totals(NamedTuple):
    """What torch recorded, in all steps of a window. Times are nanoseconds."""

    calls: Mapping[str, tuple[int, float]]  # name → how often, and the time less that of calls within
    num_launches: int  # of kernels on a GPU
    kernels_ns: float  # on the GPU
    dequantization_ns: float  # of those


def write(path: Path, torch_trace: dict[str, Any], pid: int, spans: Sequence[Span], beside: Sequence[Span],
          part_names: Sequence[str]) -> None:  # fmt: skip
    """Torch's own document with the spans added; times in it count from its base."""
    base_ns = int(torch_trace.get("baseTimeNanoseconds", 0))
    events = [*torch_trace["traceEvents"], *_names(pid)]
    events += (_complete(span, pid, base_ns, part_names) for span in spans)
    for number, span in enumerate(beside):
        events += _beginning_and_end(span, pid, base_ns, number)
    path.write_text(json.dumps(torch_trace | {"traceEvents": events}))


def totals(events: Sequence[Mapping[str, Any]]) -> Totals:
    """Of the events of torch's trace."""
    calls: dict[str, tuple[int, float]] = {}
    for name, ns in _self_times([event for event in events if event.get("cat") == "cpu_op"]):
        count, total_ns = calls.get(name, (0, 0.0))
        calls[name] = count + 1, total_ns + ns
    kernels = [event for event in events if event.get("cat") == "kernel"]
    launches = [e for e in events if str(e.get("cat", "")).startswith("cuda_") and "Launch" in e["name"]]
    dequantizing = [event for event in kernels if DEQUANTIZATION in event["name"].lower()]
    return Totals(calls, len(launches), _ns(kernels), _ns(dequantizing))


def _ns(events: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(event["dur"]) for event in events) * NS_PER_US


def _self_times(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Calls of one thread lie within each other or apart."""
    by_thread = defaultdict(list)
    for event in events:
        by_thread[event["tid"]].append(event)
    for calls in by_thread.values():
        running: list[tuple[float, list[Any]]] = []  # when it ends; its name, and its own time so far
        for event in sorted(calls, key=lambda e: (e["ts"], -e["dur"])):
            while running and running[-1][0] <= event["ts"]:
                yield tuple(running.pop()[1])
            if running:
                running[-1][1][1] -= event["dur"] * NS_PER_US
            running.append((event["ts"] + event["dur"], [event["name"], event["dur"] * NS_PER_US]))
        yield from (tuple(call) for _, call in running)


def _names(pid: int) -> Iterator[dict[str, Any]]:
    about = {"ph": "M", "pid": pid, "tid": STEPS}
    yield about | {"name": "thread_name", "args": {"name": "Tandem's steps"}}
    yield about | {"name": "thread_sort_index", "args": {"sort_index": -1}}


def _complete(span: Span, pid: int, base_ns: int, part_names: Sequence[str]) -> dict[str, Any]:
    named = zip(part_names, span.parts, strict=False)
    return _event(span.name, "X", span.start_ns - base_ns, pid) | {
        "tid": STEPS,
        "dur": (span.end_ns - span.start_ns) / NS_PER_US,
        "args": {f"{name}, ms": round(ns / 1e6, 4) for name, ns in named if ns},
    }


def _beginning_and_end(span: Span, pid: int, base_ns: int, number: int) -> Iterator[dict[str, Any]]:
    """Transfers overlap, so each is an asynchronous event with a number of its own."""
    for phase, ns in (("b", span.start_ns), ("e", span.end_ns)):
        yield _event(span.name, phase, ns - base_ns, pid) | {"tid": STEPS, "id": number}


def _event(name: str, phase: str, ns: int, pid: int) -> dict[str, Any]:
    return {"name": name, "cat": "tandem", "ph": phase, "ts": ns / NS_PER_US, "pid": pid}
