"""`tandem bench serve`: a load test of a service that runs or is started for it, and what is made of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.measure import console, table
from bench.serve import report
from bench.serve.arrivals import Schedule, arrival_named
from bench.serve.compare import compare
from bench.serve.conversation import parse_class
from bench.serve.driver import Cancelling
from bench.serve.metrics import Slo
from bench.serve.session import LoadTest, Model, Options
from bench.serve.slo import parse_slos
from bench.serve.target import GrpcTarget, HttpTarget, Target
from deploy.access import Access, access_of
from tandem.config import ClusterConfig
from tandem.errors import ConfigError


def run(params: dict[str, Any], with_search: bool, out: Path, as_json: bool) -> None:
    """Run, save, show. The server is host:port of gRPC or a URL of HTTP. Raises `ConfigError`."""
    content = asyncio.run(_run(params, with_search))
    report.save(out, content)
    shown = console(as_json)
    report.show(content, shown)
    shown.print(f"\nserve.json, serve.csv and serve.html are in {out}")
    if as_json:
        print(json.dumps(report.headline(content)))


def _config(params: dict[str, Any]) -> ClusterConfig:
    from deploy.settings import load_config  # with torch, which no running service needs

    return load_config(None, model=params["model"], draft=params["draft"])


def compare_runs(a: Path, b: Path, margin: float, as_json: bool) -> int:
    """Show what changed from A to B; returns 1 if anything got worse. Raises `ConfigError`."""
    found = compare(report.load(a), report.load(b), margin)
    how = "request by request" if found.is_paired else "as two samples: their options differ"
    columns = ("figure", "A", "B", "change", "95 % interval", "")
    rows = [
        (
            c.figure,
            f"{c.a:.4g}",
            f"{c.b:.4g}",
            f"{c.change:+.1%}",
            f"{c.low:+.1%} to {c.high:+.1%}",
            c.verdict,
        )
        for c in found.changes
    ]
    shown = console(as_json)
    shown.print(table(f"B against A, {how}", columns, rows))
    if found.same_texts is not None:
        shown.print(f"equal texts: {found.same_texts:.1%}")
    for warning in found.warnings:
        shown.print(f"[yellow]{warning}[/]")
    if as_json:
        print(json.dumps(found.to_json()))
    return 1 if found.is_worse else 0


def render(result: Path) -> None:
    """Raises `ConfigError` if it is no run."""
    folder = result if result.is_dir() else result.parent
    report.save(folder, report.load(result))
    print(folder / "serve.html")


def _options(params: dict[str, Any]) -> Options:
    """From the command's parameters. Raises `ConfigError`."""
    arrival = arrival_named(params["arrival"])
    slo = Slo(**{name: params[f"slo_{name}"] for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")})
    slos = parse_slos(params["slo"] or (), slo)
    same = ("num_requests", "concurrency", "prefix_share", "num_prefixes", "warm_up", "seed", "turns")
    return Options(
        arrival=Schedule(arrival, params["rate"], params["burstiness"], params["ramp_to"]),
        input=params["input_file"],
        input_lengths=params["input_tokens"],
        output_lengths=params["output_tokens"],
        cancelling=Cancelling(params["cancel_share"], params["cancel_after"]),
        slo=slos.default,
        class_slos=tuple(slos.by_class.items()),
        classes=tuple(parse_class(text) for text in params["request_class"] or ()),
        think_s=params["think_time"],
        trials=params["trials"],
        attainment=params["attainment"],
        **{name: params[name] for name in same},
    )


async def _run(params: dict[str, Any], with_search: bool) -> dict[str, Any]:
    access, options = access_of(params), _options(params)
    config = None if access.server else _config(params)
    async with serving(access.server, config) as where:
        target, model = await _target(where, access, params)
        try:
            test = LoadTest(target, model, options)
            found = await test.search() if with_search else None
            if found is not None and found.holding_rate is not None:
                test = test.at_rate(found.holding_rate)
            return report.document(await test.run(), test.options, where, model.name, found)
        finally:
            await target.close()


async def _target(where: str, access: Access, params: dict[str, Any]) -> tuple[Target, Model]:
    """gRPC says what the model is; over HTTP the command does."""
    if "://" not in where:
        grpc = GrpcTarget(where, token=access.token, credentials=access.credentials)
        return grpc, Model(*await grpc.facts())
    if not params["model_name"]:
        raise ConfigError("over HTTP the model has to be named: give --model-name")
    model = Model(params["model_name"], params["vocab_size"], params["max_context"])
    return HttpTarget(where, model.name, access.token, params["tls_ca"]), model


@asynccontextmanager
async def serving(address: str | None, config: ClusterConfig | None) -> AsyncIterator[str]:
    """The address that was named, or that of a service which lives as long as this block."""
    if address is not None:
        yield address
        return
    from deploy.embedded import EmbeddedService

    assert config is not None
    async with EmbeddedService(config) as service:
        yield service.address
