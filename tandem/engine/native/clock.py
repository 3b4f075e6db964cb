"""Where the time of native forwards goes, part by part, as the thread that calls them sees it.

`linears` have `quantize activations` within them; codes are looked up in registers on their way to a product
and cannot be told from it. `waiting` is for the other threads of the team.
"""

from __future__ import annotations

import ctypes

from tandem.engine.native import library

PARTS = (
    *("embedding", "norms", "linears", "rope, KV write", "attention", "activation"),
    *("head", "choosing tokens", "waiting", "quantize activations"),
)
WITHIN_LINEARS = frozenset({"quantize activations"})


class Clock:
    """Counts in all engines of this process while it runs; what it costs is a few per mille of a step."""

    def __init__(self, isa: str) -> None:
        self._library = library.load(isa)
        self._library.tandem_clock_run.argtypes = (ctypes.c_int32,)
        self._library.tandem_clock_run.restype = None
        self._library.tandem_clock_read.argtypes = (ctypes.c_void_p,)
        self._library.tandem_clock_read.restype = ctypes.c_double
        self._ticks = (ctypes.c_int64 * len(PARTS))()
        self._tick_ns: float = self._library.tandem_clock_read(self._ticks)

    def start(self) -> None:
        self._library.tandem_clock_run(1)

    def stop(self) -> None:
        self._library.tandem_clock_run(0)

    def read(self) -> tuple[float, ...]:
        """Nanoseconds of each of `PARTS` since the library was loaded."""
        self._library.tandem_clock_read(self._ticks)
        return tuple(ticks * self._tick_ns for ticks in self._ticks)
