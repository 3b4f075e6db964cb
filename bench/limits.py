"""The two limits of a machine: how fast it reads memory, and how fast it multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.measure import interleave

if TYPE_CHECKING:
    import torch

SIDE = 8192  # of the matrix that is read
SIZE, ROWS = 2048, 256  # of matrices that are multiplied: by torch, and by our kernels with the one above


@dataclass(frozen=True, slots=True)
class Limits:
    """What no program on this machine gets past, as measured now."""

    bytes_per_s: float  # read from memory
    flops: float  # of fp32 products


def limits(threads: int, rounds: int = 5, device: str = "cpu") -> Limits:
    """The best of some rounds of reading a large tensor and of multiplying large matrices, by torch and by
    our own kernels where there are any: neither is the faster one on every processor."""
    import torch

    torch.set_num_threads(threads)
    reads, products = _probes(torch.ones(SIDE, SIDE, device=device), device)
    times = interleave({name: probe.seconds for name, probe in (reads | products).items()}, rounds)

    def most(probes: Mapping[str, _Probe]) -> float:
        return max(probe.amount / min(times[name]) for name, probe in probes.items())

    return Limits(most(reads), most(products))


def best(*found: Limits) -> Limits:
    """What was reached at all, of several measurements of the limits."""
    return Limits(max(limit.bytes_per_s for limit in found), max(limit.flops for limit in found))


@dataclass(frozen=True, slots=True)
class _Probe:
    """Reads so many bytes, or makes so many operations."""

    amount: float
    call: Callable[[], object]

    def seconds(self) -> float:
        began_s = time.perf_counter()
        self.call()
        return time.perf_counter() - began_s


def _probes(large: torch.Tensor, device: str) -> tuple[dict[str, _Probe], dict[str, _Probe]]:
    """Those that read memory, and those that multiply. `large` is [side, side], fp32."""
    import torch

    from tandem.engine.native.kernels import kernels_for
    from tandem.engine.native.library import engine
    from tandem.engine.native.packing import pack_linear

    square = torch.randn(SIZE, SIZE, device=device)
    # A number that is fetched is a result that is there, on a GPU too.
    reads = {"sum": _Probe(4 * large.numel(), lambda: large.sum().item())}
    products = {"product": _Probe(2 * SIZE**3, lambda: (square @ square)[0, 0].item())}
    if isa := kernels_for(device):
        own, weights = engine(isa), pack_linear(large.half())
        rows = torch.ones(ROWS, large.shape[1])
        reads["own, one row"] = _Probe(2 * large.numel(), lambda: own.linear(weights, rows[:1]))
        products["own, many rows"] = _Probe(2 * ROWS * large.numel(), lambda: own.linear(weights, rows))
    return reads, products
