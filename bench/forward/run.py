"""The whole run: limits of the machine, all forwards, transformers beside them; then files and tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.forward import cells as forward_cells
from bench.forward import plots, report
from bench.forward.cells import OUTPUTS, Timing, kv_tokens
from bench.forward.reference import Reference
from bench.forward.results import Options, Results
from bench.forward.rig import BLOCK_SIZE, Rig
from bench.limits import best, limits
from bench.measure import Meter, console, dtype_on, flat, machine, write_csv, write_json
from bench.plotting import require_matplotlib
from bench.shapes import checkpoint
from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry

KV_BYTES, FULL_KV_BYTES = 2 << 30, 8 << 30
FREE_SHARE = 0.5  # of the memory that is free: the most the cache may take


def run(options: Options, as_json: bool) -> dict[str, Any]:
    """Measure, print the tables, write the files; the document that was written.

    Raises `ConfigError` for a shape or a device that there is not.
    """
    if options.plots:
        require_matplotlib()
    results = measure(options)
    shown = console(as_json)
    content = document(results)
    out = options.out
    write_csv(out / "forward.csv", content["rows"])
    write_csv(out / "outputs.csv", content["outputs"])
    write_csv(out / "beside.csv", content["beside"])
    write_json(out / "forward.json", content)
    (out / "forward.md").write_text(report.markdown(results))
    report.show(results, shown)
    files = list(plots.draw(out, results)) if options.plots else []
    shown.print(f"\nforward.json, forward.md, tables as CSV and {len(files)} plots are in {out}")
    return content


def measure(options: Options) -> Results:
    """Everything, in the order in which it needs memory."""
    _check(options.device)
    torch.set_num_threads(options.threads)
    path = checkpoint(options.shape)
    found = limits(options.threads, device=options.device)
    wanted = forward_cells.cells(options.full)
    total = forward_cells.num_runs(wanted, options.rounds) + forward_cells.num_others()
    with Meter("forward", total) as meter:
        meter.say("loading")
        most = max([*map(kv_tokens, wanted), forward_cells.LONG + max(OUTPUTS)])
        budget = FULL_KV_BYTES if options.full else KV_BYTES
        rig = Rig(path, options.device, room(path, most, budget, options.device))
        timings, skipped = forward_cells.measure(
            rig, wanted, options.rounds, free_bytes(options.device), meter
        )
        outputs = list(forward_cells.outputs(rig, meter))
        reference = Reference(path, options.device, rig.dtype)
        beside = list(forward_cells.beside(rig, reference, options.rounds, meter))
        if options.profile is not None:
            forward_cells.profile(rig, options.profile)
    found = best(found, limits(options.threads, device=options.device))  # neighbours come and go
    engine = rig.runner.describe()
    return Results(options, found, rig.traffic(), engine, timings, skipped, outputs, beside)


def document(results: Results) -> dict[str, Any]:
    """Everything as JSON takes it."""
    options, growth = results.options, results.slope
    return {
        "machine": machine(options.threads),
        "device": options.device,
        "shape": options.shape,
        "engine": results.engine,
        "limits": flat(results.limits),
        "rows": [_row(timing, results) for timing in results.timings],
        "skipped": [asdict(skip.cell) | {"why": skip.why} for skip in results.skipped],
        "slope": asdict(growth) | {"over_limit": growth.over_limit} if growth else None,
        "outputs": [asdict(output) for output in results.outputs],
        "beside": [
            asdict(row.cell) | {name: value for name, value in flat(row).items() if name != "cell"}
            for row in results.beside
        ],
    }


def _row(timing: Timing, results: Results) -> dict[str, Any]:
    cell, seconds = timing.cell, timing.seconds
    work = report.work_of(cell, results.traffic)
    return asdict(cell) | {
        "seconds": seconds.median,
        "seconds_low": seconds.low,
        "seconds_high": seconds.high,
        "bytes": work.num_bytes,
        "flops": work.num_flops,
        "memory_share": work.memory_share(seconds.median, results.limits),
        "arithmetic_share": work.arithmetic_share(seconds.median, results.limits),
    }


def _check(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, not {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; go without --device")


def room(path: Path, most_tokens: int, budget_bytes: int, device: str) -> int:
    """Tokens of KV: so many, blocks that are not full besides, as far as the budget and free memory allow.

    Raises `ConfigError` if memory holds none.
    """
    each = ModelGeometry.from_path(path).kv_bytes(1, dtype_on(device))
    budget = min(budget_bytes, int(FREE_SHARE * free_bytes(device)))
    if budget < each:
        raise ConfigError(f"{budget} bytes hold no token of KV ({each} bytes); free some memory")
    return min(most_tokens + max(forward_cells.BATCHES) * BLOCK_SIZE, budget // each)


def free_bytes(device: str) -> int:
    """Memory of the device that nobody uses."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(found) << 10
