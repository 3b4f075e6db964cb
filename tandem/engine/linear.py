"""Which kernel multiplies by a weight matrix on a CPU, chosen by what was proven on this machine.

The engine promises that a row's result does not depend on the rows beside it. No kernel promises that:
most take another path for 1, 2 or 7 rows than for 64. So each is probed when a model is loaded, on the
layer's own shape: the row counts that give the same bits as `TILE` rows do are the ones used. Other
counts are padded up to the next good one, larger ones are cut into tiles.

    fp16   fbgemm: weights stored in half precision, arithmetic in fp32. Lossless if every weight is
           exactly a half-precision number, and `auto` takes it only then. Half the memory traffic.
    fp32   oneDNN with the weight packed once
    plain  `torch.nn.functional.linear`

Prefill uses the same kernels: tiles cost it nothing measurable, and a chunk boundary changes no bit.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

TILE = 64  # rows; the reference every other row count is compared with
PROBED_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 32, 40, 48, TILE)

Probes = dict[tuple[str, int, int, bool], tuple[int, ...]]  # (kernel, in, out, bias) → stable rows
Kernel = Callable[[torch.Tensor], torch.Tensor]  # [rows, in_features] → [rows, out_features]


@dataclass(frozen=True, slots=True)
class LinearChoice:
    """The kernel of one layer, why it was taken, and the row counts that are bitwise stable on it."""

    kernel: str
    reason: str
    rows: tuple[int, ...] = ()


class RowTable:
    """Row counts that are bitwise stable, and how to reach one from any count."""

    def __init__(self, good: tuple[int, ...] = (TILE,)) -> None:
        self.good = good

    def padded(self, rows: int) -> int:
        """The smallest number of rows, at least `rows`, that splits into stable tiles."""
        whole, rest = divmod(rows, TILE)
        return whole * TILE + (self.good[bisect.bisect_left(self.good, rest)] if rest else 0)


class TiledLinear(torch.nn.Module):
    """A linear layer that runs one kernel only at row counts where it is bitwise stable."""

    def __init__(self, kernel: Kernel, out_features: int, choice: LinearChoice) -> None:
        super().__init__()
        self.kernel = kernel
        self.out_features = out_features
        self.choice = choice
        self.table = RowTable(choice.rows)
        self._stable = frozenset(choice.rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rows = flat.shape[0]
        out = self.kernel(flat) if rows in self._stable else self._tiled(flat)
        return out.view(*x.shape[:-1], self.out_features)

    def _tiled(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if not rows:
            return x.new_empty(0, self.out_features)
        padding = self.table.padded(rows) - rows
        if padding:
            x = F.pad(x, (0, 0, 0, padding))
        parts = [self.kernel(part) for part in torch.split(x, TILE)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]


def fits(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether every number is exactly representable in that type."""
    return bool((weight.to(dtype).to(weight.dtype) == weight).all())


def fp16_kernel(linear: torch.nn.Linear) -> Kernel:
    """fbgemm's linear with packed half-precision weights."""
    packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), _bias(linear))
    op = _direct(torch.ops.quantized.linear_dynamic_fp16)
    return lambda x: op(x, packed)


def fp32_kernel(linear: torch.nn.Linear) -> Kernel:
    """oneDNN's linear with the weight reordered once for small row counts."""
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)
    bias, op = _bias(linear), _direct(torch.ops.mkldnn._linear_pointwise.default)
    return lambda x: op(x, packed, bias, "none", [], "")


def plain_kernel(linear: torch.nn.Linear) -> Kernel:
    weight, bias = linear.weight.detach(), _bias(linear)
    return lambda x: F.linear(x, weight, bias)


def _direct(op: Any) -> Callable[..., torch.Tensor]:
    """The operator without torch's Python dispatch, which costs as much as a small product does."""
    return getattr(op, "_op", op)  # type: ignore[no-any-return]


def _bias(linear: torch.nn.Linear) -> torch.Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def stable_rows(kernel: Kernel, in_features: int) -> tuple[int, ...]:
    """The probed row counts that give each row the bits it has in a tile; empty if a tile's own rows move.

    They hold for one thread and for all, because workers change the number of threads as they run.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TILE, in_features, generator=generator)
    order = torch.randperm(TILE, generator=generator)
    before = torch.get_num_threads()
    reference, stable = kernel(x), list(PROBED_ROWS)
    try:
        for threads in sorted({1, before, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(threads)
            if not torch.equal(kernel(x[order]), reference[order]):
                return ()
            stable = [rows for rows in stable if torch.equal(kernel(x[-rows:]), reference[-rows:])]
    finally:
        torch.set_num_threads(before)
    return tuple(stable) if TILE in stable else ()


KERNELS: dict[str, Callable[[torch.nn.Linear], Kernel]] = {
    "fp16": fp16_kernel,
    "fp32": fp32_kernel,
    "plain": plain_kernel,
}


def choose(linear: torch.nn.Linear, wanted: str, probes: Probes | None = None) -> TiledLinear | None:
    """The first kernel, in order of preference, that is stable here. None: keep the layer as it is.

    `probes` remembers what was found for a shape, so that equal layers are probed once.
    """
    probes = {} if probes is None else probes
    if linear.weight.device.type != "cpu" or linear.weight.dtype != torch.float32:
        return None
    order, reason = _preference(linear, wanted)
    for name in order:
        try:
            kernel = KERNELS[name](linear)
            key = (name, linear.in_features, linear.out_features, linear.bias is not None)
            rows = probes[key] if key in probes else stable_rows(kernel, linear.in_features)
            probes[key] = rows
        except (RuntimeError, AttributeError) as error:  # this build of torch lacks the operator
            reason = f"{name} is not available here ({type(error).__name__})"
            continue
        if rows:
            return TiledLinear(kernel, linear.out_features, LinearChoice(name, reason, rows))
        reason = f"{name} is not stable over rows here"
    return None


def _preference(linear: torch.nn.Linear, wanted: str) -> tuple[tuple[str, ...], str]:
    if wanted == "fp16":
        return ("fp16", "fp32", "plain"), "asked for"
    if wanted == "fp32":
        return ("fp32", "plain"), "asked for"
    if fits(linear.weight.detach(), torch.float16):
        return ("fp16", "fp32", "plain"), "weights are exact in half precision"
    return ("fp32", "plain"), "weights need single precision"


def swap_linears(model: torch.nn.Module, wanted: str = "auto") -> dict[str, LinearChoice]:
    """Replace every `nn.Linear` by its best kernel; returns what was chosen, by module name."""
    report: dict[str, LinearChoice] = {}
    probes: Probes = {}
    linears = [(name, m) for name, m in model.named_modules() if type(m) is torch.nn.Linear]
    for name, linear in linears:
        chosen = choose(linear, wanted, probes)
        if chosen is None:
            where = f"{linear.weight.dtype} on {linear.weight.device.type}".removeprefix("torch.")
            report[name] = LinearChoice("torch", f"{where}: rows may depend on the batch")
            continue
        report[name] = chosen.choice
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, chosen)
    return report


def common_table(choices: Iterable[LinearChoice]) -> RowTable | None:
    """Row counts that are stable on every layer at once, so that no layer has to pad by itself."""
    stable = [set(choice.rows) for choice in choices if choice.rows]
    return RowTable(tuple(sorted(set.intersection(*stable)))) if stable else None
