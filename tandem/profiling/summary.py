"""Where the time of a step goes, as text: the spans right within steps, and the counters within those.

What is in a step and in no span of it is Python: scheduling, stops, detokenizing, messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import fsum

from tandem.profiling.recording import Span
from tandem.profiling.trace import Totals

WIDTH = 30  # of names
LEAST_SHARE = 0.001  # of a step; parts of less are left out
MOST_CALLS = 5  # of torch that are named
NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class Profile:
    """What was recorded of one process. Spans are in the order of their ends."""

    name: str
    about: str  # what runs there
    spans: Sequence[Span]
    beside: Sequence[Span]
    num_beside_left_out: int
    part_names: Sequence[str]
    within: frozenset[str]  # parts that are counted in the part before them too: `linears`
    totals: Totals

    @property
    def steps(self) -> list[Span]:
        return [span for span in self.spans if not span.depth]


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a table: milliseconds and times, per step."""

    name: str
    ms: float
    share: float
    times: float | None = None
    indent: int = 0

    def __str__(self) -> str:
        name = "  " * self.indent + self.name
        times = "" if self.times is None else f"{self.times:10.2f}"
        return f"{name:{WIDTH}}{self.ms:10.3f}{100 * self.share:9.1f} %{times}"


def text(profile: Profile) -> str:
    """The whole summary."""
    steps = profile.steps
    if not steps:
        return f"{profile.name}: no step ran while the profile was taken\n"
    window_ns = max(step.end_ns for step in steps) - min(step.start_ns for step in steps)
    busy_ns = sum(map(_length, steps))
    lines = [
        f"{profile.name}: {len(steps)} steps, {busy_ns / NS_PER_MS:.1f} ms of {window_ns / NS_PER_MS:.1f} ms",
        profile.about,
    ]
    for kind in sorted({step.name for step in steps}):
        lines += ["", *_table(profile, kind)]
    return "\n".join([*lines, "", *_torch(profile), *_beside(profile)]) + "\n"


def lines(profile: Profile, kind: str) -> Iterator[Line]:
    """Of the steps of one kind: each span right within them, then what is in none."""
    steps = [step for step in profile.steps if step.name == kind]
    inner = [span for span in _within(profile.spans, kind) if span.depth == 1]
    step_ns = sum(map(_length, steps))
    if not inner:  # the step itself is a forward
        yield from _parts(profile, steps, len(steps), step_ns, 0)
        return
    order = {span.name: None for span in inner}
    for name in order:
        some = [span for span in inner if span.name == name]
        spent_ns = sum(map(_length, some))
        yield _line(name, spent_ns, len(steps), step_ns, len(some) / len(steps))
        yield from _parts(profile, some, len(steps), step_ns, 1)
    yield _line("Python", step_ns - sum(map(_length, inner)), len(steps), step_ns)


def _table(profile: Profile, kind: str) -> Iterator[str]:
    steps = [step for step in profile.steps if step.name == kind]
    each_ms = sum(map(_length, steps)) / len(steps) / NS_PER_MS
    yield f"{kind}: {len(steps)} of {each_ms:.3f} ms"
    yield f"{'':{WIDTH}}{'ms a step':>10}{'share':>11}{'times':>10}"
    yield from map(str, lines(profile, kind))


def _within(spans: Sequence[Span], kind: str) -> Iterator[Span]:
    """Spans of steps of a kind: a step ends after everything in it."""
    some: list[Span] = []
    for span in spans:
        some.append(span)
        if not span.depth:
            yield from some if span.name == kind else ()
            some = []


def _parts(
    profile: Profile, spans: Sequence[Span], num_steps: int, step_ns: float, indent: int
) -> Iterator[Line]:
    """What the counters say of these spans, and what is around it; nothing where they did not count."""
    columns = zip(*(span.parts for span in spans), strict=True)
    sums = {name: fsum(ns) for name, ns in zip(profile.part_names, columns, strict=False)}
    counted_ns = sum(ns for name, ns in sums.items() if name not in profile.within)
    if not counted_ns:
        return
    within_ns = sum(ns for name, ns in sums.items() if name in profile.within)
    sums["linears"] = sums.get("linears", 0.0) - within_ns
    for name, ns in sums.items():
        if ns >= LEAST_SHARE * step_ns:
            yield _line(name, ns, num_steps, step_ns, indent=indent)
    yield _line(
        "Python around the kernels", sum(map(_length, spans)) - counted_ns, num_steps, step_ns, indent=indent
    )


def _line(
    name: str, ns: float, num_steps: int, step_ns: float, times: float | None = None, indent: int = 0
) -> Line:
    return Line(name, ns / num_steps / NS_PER_MS, ns / step_ns, times, indent)


def _length(span: Span) -> int:
    return span.end_ns - span.start_ns


def _torch(profile: Profile) -> Iterator[str]:
    found, num_steps = profile.totals, len(profile.steps)
    calls = sum(count for count, _ in found.calls.values())
    total_ms = sum(ns for _, ns in found.calls.values()) / num_steps / NS_PER_MS
    yield f"torch: {calls / num_steps:.1f} calls a step, {total_ms:.3f} ms"
    for name, (count, ns) in sorted(found.calls.items(), key=lambda item: -item[1][1])[:MOST_CALLS]:
        yield f"  {name:{WIDTH}}{count / num_steps:8.1f} times{ns / num_steps / NS_PER_MS:10.3f} ms"
    if found.num_launches:
        kernels_ms, part_ms = (
            ns / num_steps / NS_PER_MS for ns in (found.kernels_ns, found.dequantization_ns)
        )
        yield (
            f"GPU: {found.num_launches / num_steps:.1f} launches a step, {kernels_ms:.3f} ms in kernels, "
            f"{part_ms:.3f} ms of it dequantization"
        )


def _beside(profile: Profile) -> Iterator[str]:
    ordered = sorted(profile.beside, key=lambda span: span.name)
    for name, some in groupby(ordered, key=lambda span: span.name):
        lengths = [_length(span) / NS_PER_MS for span in some]
        mean_ms, most_ms = sum(lengths) / len(lengths), max(lengths)
        yield f"{name}, beside the steps: {len(lengths)} times, {mean_ms:.2f} ms each, {most_ms:.2f} at most"
    if profile.num_beside_left_out:
        yield f"{profile.num_beside_left_out} more were not kept"
