"""Every linear kernel against fp32 `F.linear`, by shape, rows and threads: `tandem bench kernels`.

Weights are cold: each call takes the next of enough copies that they come from memory, as in a model. All
kernels of a cell take turns; the figure is the median of the ratios within rounds. The error is the largest
difference from the product with the dequantized weights in double precision, over its largest output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.measure import Meter, Spread, console, flat, interleave, machine, table, write_csv, write_json
from tandem.engine.linear import fp16_kernel, fp32_kernel
from tandem.engine.native import build, library, packing
from tandem.engine.native.arena import Arena
from tandem.engine.quantization.formats import quantize

SHAPES = ((1024, 1024), (2048, 8192))  # in, out
ROWS = (1, 4, 8, 32)
COLD_BYTES = 128 << 20  # of fp32 weights; more than any cache
MOST_COPIES = 32
PATIENCE_S = 0.1
BASE = "F.linear fp32"

Run = Callable[[int, torch.Tensor], torch.Tensor]  # number of the copy, rows → outputs


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel in one cell."""

    in_features: int
    out_features: int
    rows: int
    threads: int
    kernel: str
    microseconds: Spread
    speed_up: Spread  # over F.linear fp32
    max_error: float


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel over some copies of one weight matrix, and the weights it stands for."""

    run: Run
    weight: torch.Tensor  # [out, in] float64


def measure(shapes: tuple[tuple[int, int], ...], rounds: int, threads: int) -> list[Row]:
    """All kernels that run here, in all cells."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with torch.inference_mode(), Meter("kernels", len(shapes) * len(ROWS)) as meter:
        for in_features, out_features in shapes:
            meter.say(f"{in_features} × {out_features}")
            weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
            kernels = dict(_kernels(weight))
            for count in ROWS:
                rows += _cell(kernels, in_features, out_features, count, rounds, threads)
                meter.step()
    return rows


def _cell(
    kernels: dict[str, Kernel], in_features: int, out_features: int, count: int, rounds: int, threads: int
) -> Iterator[Row]:
    x = torch.randn(count, in_features, generator=torch.Generator().manual_seed(1))
    times = interleave({name: partial(_time, kernel, x) for name, kernel in kernels.items()}, rounds)
    for name, kernel in kernels.items():
        exact = x.double() @ kernel.weight.T
        error = (kernel.run(0, x) - exact).abs().max() / exact.abs().max()
        yield Row(
            in_features,
            out_features,
            count,
            threads,
            name,
            Spread.of(1e6 * seconds for seconds in times[name]),
            Spread.of_ratios(times[BASE], times[name]),
            float(error),
        )


def _time(kernel: Kernel, x: torch.Tensor) -> float:
    """Seconds of a call, each with the next copy of the weights; slow kernels are called less often."""
    began_s = time.perf_counter()
    for number in range(MOST_COPIES):
        kernel.run(number, x)
        passed_s = time.perf_counter() - began_s
        if passed_s > PATIENCE_S:
            break
    return passed_s / (number + 1)


def _kernels(weight: torch.Tensor) -> Iterator[tuple[str, Kernel]]:
    copies = min(MOST_COPIES, -(-COLD_BYTES // (4 * weight.numel())))
    plain = [weight.clone() for _ in range(copies)]
    yield BASE, Kernel(lambda i, x: F.linear(x, plain[i % copies]), weight.double())
    half = weight.half().float()
    for name, kind, matrix in (("oneDNN fp32", fp32_kernel, weight), ("fbgemm fp16", fp16_kernel, half)):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = matrix
        yield name, Kernel(_of_copies([kind(linear) for _ in range(copies)]), matrix.double())
    yield from _native(weight, copies)
    yield from _bitsandbytes(weight, copies)


def _of_copies(packed: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Run:
    return lambda number, x: packed[number % len(packed)](x)


def _native(weight: torch.Tensor, copies: int) -> Iterator[tuple[str, Kernel]]:
    isa = build.instruction_set()

    def kernel(packed: list[packing.PackedLinear], matrix: torch.Tensor) -> Kernel:
        return Kernel(lambda i, x: library.engine(isa).linear(packed[i % len(packed)], x), matrix.double())

    half = weight.half()
    yield f"own fp16 ({isa})", kernel([packing.pack_linear(half) for _ in range(2 * copies)], half.float())
    brain = [packing.pack_bf16(weight) for _ in range(2 * copies)]
    yield f"own bf16 ({isa})", kernel(brain, weight.bfloat16().float())
    for kind in ("int8", "nf4", "int4", "int4-rotated", "int4-outliers"):
        quantized = quantize(weight, kind)
        assert quantized is not None
        bits = "W8" if kind == "int8" else "W4"
        for activation_bits, width in ((16, "A16"), (8, "A8")):
            packed = [
                packing.pack_quantized(quantized, activation_bits, None, Arena()) for _ in range(4 * copies)
            ]
            yield f"own {kind} {bits}{width} ({isa})", kernel(packed, quantized.dequantize())


def _bitsandbytes(weight: torch.Tensor, copies: int) -> Iterator[tuple[str, Kernel]]:
    try:
        import bitsandbytes
    except ImportError:
        return
    multiply: Any = bitsandbytes.matmul_4bit  # type: ignore[attr-defined]
    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    many = [codes.clone() for _ in range(copies)]

    def run(number: int, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = multiply(x, many[number % copies].t(), quant_state=state)
        return out

    yield "bitsandbytes nf4", Kernel(run, bitsandbytes.functional.dequantize_4bit(codes, state).double())


def qspec(rows: list[Row]) -> Iterator[tuple[Row, float, float]]:
    """W4A8 in each cell over W4A16 as bitsandbytes runs it (0 without it), and over our own."""
    cells: dict[tuple[int, int, int], dict[str, Row]] = {}
    for row in rows:
        key = (row.in_features, row.out_features, row.rows)
        cells.setdefault(key, {})[row.kernel.partition(" (")[0]] = row
    for cell in cells.values():
        draft, own = cell["own nf4 W4A8"], cell["own nf4 W4A16"]
        theirs = cell.get("bitsandbytes nf4")
        over_theirs = theirs.microseconds.median / draft.microseconds.median if theirs else 0.0
        yield draft, over_theirs, own.microseconds.median / draft.microseconds.median


def run(rounds: int, threads: int, out: Path, as_json: bool) -> dict[str, Any]:
    """Measure, print the tables, write CSV and JSON; the document that was written."""
    rows, shown = measure(SHAPES, rounds, threads), console(as_json)
    shown.print(
        table(
            f"linear kernels, {threads} threads: times faster than {BASE} (low…high)",
            ("in × out", "kernel", "rows", "µs", "speed-up", "max error"),
            (
                (
                    f"{row.in_features} × {row.out_features}",
                    row.kernel,
                    str(row.rows),
                    f"{row.microseconds.median:.0f}",
                    f"{row.speed_up.median:.2f} ({row.speed_up.low:.2f}…{row.speed_up.high:.2f})",
                    f"{row.max_error:.0e}",
                )
                for row in rows
            ),
            left=2,
        )
    )
    shown.print(
        table(
            "QSpec's two widths: W4A8 over W4A16",
            ("in × out", "rows", "over bitsandbytes", "over our own"),
            (
                (f"{r.in_features} × {r.out_features}", str(r.rows), f"{theirs:.1f}x", f"{own:.2f}x")
                for r, theirs, own in qspec(rows)
            ),
        )
    )
    flats = [flat(row) for row in rows]
    content = {"machine": machine(threads), "base": BASE, "kernels": flats}
    write_csv(out / "kernels.csv", flats)
    write_json(out / "kernels.json", content)
    return content
