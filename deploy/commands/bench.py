"""`tandem bench`: experiments, each with a table on the terminal and files in a folder."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console


def speculation(
    large: str,
    full: bool,
    rounds: int,
    minutes: float,
    threads: int,
    openvino_python: Path | None,
    profile: Path | None,
    only: tuple[str, ...],
    quantization: str,
    out: Path,
    with_plots: bool,
    as_json: bool,
) -> None:
    """What speculation earns. Raises `ConfigError` for what cannot be measured here."""
    from bench.measure import console
    from bench.plotting import require_matplotlib
    from bench.speculation import plots, report
    from bench.speculation.runner import Benchmark, Options

    if with_plots:
        require_matplotlib()
    options = Options(large, full, rounds, minutes, threads, openvino_python, profile, only, quantization)
    results = Benchmark(options).run()
    content = report.document(results, options)
    report.save(out, content)
    shown: Console = console(as_json)
    report.show(results, options, shown)
    files = list(plots.draw(out, results.rows)) if with_plots else []
    shown.print(f"\nspeculation.json, tables as CSV and {len(files)} plots are in {out}")
    if as_json:
        print(json.dumps(content))


def kernels(rounds: int, threads: int, out: Path, as_json: bool) -> None:
    """Every linear kernel against fp32 `F.linear`. Raises `ConfigError` if our own cannot run here."""
    from bench.kernels import run
    from tandem.engine.native.build import NotNativeError
    from tandem.errors import ConfigError

    try:
        content = run(rounds, threads, out, as_json)
    except NotNativeError as error:
        raise ConfigError(f"there is nothing of ours to compare: {error}") from error
    if as_json:
        print(json.dumps(content))


def peers(
    shape: str,
    rounds: int,
    threads: int,
    openvino_python: Path | None,
    vllm_python: Path | None,
    profile: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Ourselves beside others on one checkpoint. Raises `ConfigError` for what cannot be measured here."""
    from bench.peers.run import Options, run

    content = run(Options(shape, rounds, threads, openvino_python, out, vllm_python, profile), as_json)
    if as_json:
        print(json.dumps(content))


def forward(
    shape: str,
    full: bool,
    rounds: int,
    threads: int,
    device: str,
    profile: Path | None,
    out: Path,
    with_plots: bool,
    as_json: bool,
) -> None:
    """What one forward costs. Raises `ConfigError` for what cannot be measured here."""
    from bench.forward.results import Options
    from bench.forward.run import run

    content = run(Options(shape, full, rounds, threads, device, out, with_plots, profile), as_json)
    if as_json:
        print(json.dumps(content))


def router(workers: int, requests: int, streams: int, rounds: int, out: Path, as_json: bool) -> None:
    """The router's decisions on a virtual clock; or with `streams`, a router process with null workers."""
    if streams:
        from bench.streams.run import Load
        from bench.streams.run import run as run_streams

        content = run_streams(Load.of(streams), rounds, out, as_json)
    else:
        from bench.router import run

        content = run(workers, requests, out, as_json)
    if as_json:
        print(json.dumps(content))
