"""Takes the profile of one process: torch's profiler, the native kernels' clock, NVTX ranges on a GPU.

NAME.trace.json is for Perfetto or chrome://tracing, NAME.txt says in words where a step's time went. Both are
written when the window closes (tandem.profiling.recording), in a thread of their own, or by `close`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tandem.config import ClusterConfig
from tandem.config_profile import ProfileConfig
from tandem.engine.loading import Engine
from tandem.engine.native import build
from tandem.engine.native.clock import PARTS, WITHIN_LINEARS, Clock
from tandem.profiling import spans, summary, trace
from tandem.profiling.recording import Recording

TRACE, TEXT = ".trace.json", ".txt"
QUIET = "9"  # above all levels of messages


@cache
def prepare() -> None:
    """Let torch's profiler load what it needs: seconds the first time, which no step should wait. It wants
    to be called on the thread that imported torch."""
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    with profile(activities=[ProfilerActivity.CPU]):
        pass


class Profiler:
    """From the first step on, until there were `settings.steps`, or `close`. Raises `ConfigError` if this
    process is profiled already."""

    def __init__(self, settings: ProfileConfig, name: str, about: str, *, is_native: bool) -> None:
        assert settings.dir is not None
        self._folder = settings.dir
        self._name = name
        self._about = about
        self._instruments = _Instruments(Clock(build.instruction_set()) if is_native else None)
        self._writer: threading.Thread | None = None
        self._recording = Recording(settings.steps, self._instruments, self._write_soon)
        spans.install(self._recording)

    def close(self) -> None:
        """Call it when no more steps come; on the computing thread, or after it has ended.
        What was recorded is written when this returns."""
        self._recording.end()
        spans.uninstall()
        if self._writer is None:
            self._write()
        else:
            self._writer.join()

    def _write_soon(self) -> None:
        self._writer = threading.Thread(target=self._write, name="profile")
        self._writer.start()

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        found = self._instruments.events(self._folder / f"{self._name}{TRACE}")
        recording = self._recording
        kept = recording.spans, recording.beside_spans
        if recording.spans:
            trace.write(self._folder / f"{self._name}{TRACE}", found, os.getpid(), *kept, PARTS)
        content = summary.Profile(
            self._name,
            self._about,
            *kept,
            recording.num_beside_left_out,
            PARTS,
            WITHIN_LINEARS,
            trace.totals(found["traceEvents"]),
        )
        (self._folder / f"{self._name}{TEXT}").write_text(summary.text(content))


def profiler_of(config: ClusterConfig, name: str, engine: Engine) -> Profiler | None:
    """Of a worker, if profiles are asked for."""
    if config.profile.dir is None:
        return None
    is_native = engine.model.implementation == "native"
    return Profiler(config.profile, name, engine.describe(), is_native=is_native)


@contextmanager
def profiled(settings: ProfileConfig, name: str, about: str, *, is_native: bool) -> Iterator[None]:
    """The steps of this thread until the block ends."""
    profiler = Profiler(settings, name, about, is_native=is_native)
    try:
        yield
    finally:
        profiler.close()


class _Instruments:
    """`tandem.profiling.recording.Instruments` of torch and of our kernels."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        prepare()
        self._is_on_gpu = torch.cuda.is_available()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_on_gpu else [])]
        self._profile = profile(activities=kinds)
        self._was_open = False

    def open(self) -> None:
        self._was_open = True
        self._profile.start()
        if self._clock:
            self._clock.start()

    def close(self) -> None:
        if self._clock:
            self._clock.stop()
        self._profile.stop()

    def enter(self, name: str) -> None:
        if self._is_on_gpu:
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        if self._is_on_gpu:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    def counters(self) -> Sequence[float]:
        return self._clock.read() if self._clock else ()

    def events(self, scratch: Path) -> dict[str, Any]:
        """Torch's trace, by way of a file."""
        if not self._was_open:
            return {"traceEvents": []}
        self._profile.export_chrome_trace(str(scratch))
        found: dict[str, Any] = json.loads(scratch.read_text())
        return found
