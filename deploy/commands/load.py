"""`tandem bench serve`: a load test of a service that runs or is started for it, and what is made of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import console, table
from bench.serve import report
from bench.serve.arrivals import Schedule, arrival_named
from bench.serve.compare import compare
from bench.serve.conversation import parse_class
from bench.serve.driver import Cancelling
from bench.serve.protocol import check_comparable, protocol_cost
from bench.serve.scrape import Scraper
from bench.serve.session import LoadTest, Model, Options
from bench.serve.slo import parse_slos
from bench.serve.target import GrpcTarget, HttpTarget, Target
from deploy.access import Access, access_of
from deploy.commands.running import Running, serving
from tandem.config import ClusterConfig
from tandem.errors import ConfigError


def run(params: dict[str, Any], with_search: bool, out: Path, as_json: bool) -> None:
    """Run, save, show. The server is host:port of gRPC or a URL of HTTP. Raises `ConfigError`."""
    content = asyncio.run(_run(params, with_search))
    pictures = report.save(out, content)
    shown = console(as_json)
    report.show(content, shown)
    shown.print(f"\nserve.json, serve.csv, serve.html and {len(pictures)} PNGs are in {out}")
    if not pictures:
        shown.print("PNGs need matplotlib: pip install 'tandem-serve[bench]'")
    if as_json:
        print(json.dumps(report.headline(content)))


def _config(params: dict[str, Any]) -> ClusterConfig:
    from deploy.settings import load_config  # with torch, which no running service needs

    return load_config(None, model=params["model"], draft=params["draft"], http_port=0)


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
    slos = parse_slos(params["slo"] or ())
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
    access, options = access_of(params, takes_urls=True), _options(params)
    if params["protocols"]:
        check_comparable(options)
    config = None if access.server else _config(params)
    async with (
        serving(access.server, config) as service,
        _targets(service, access, params) as (targets, model),
    ):
        scraping = _scraping(service, access, params)
        test, *others = (LoadTest(target, model, options, scraping) for target in targets)
        found = await test.search() if with_search else None
        if found is not None and found.holding_rate is not None:
            test, *others = (one.at_rate(found.holding_rate) for one in (test, *others))
        content = report.document(await test.run(), test.options, service.address, model.name, found)
        for over_http in others:
            content["protocol"] = await protocol_cost(test, over_http)
        return content


@asynccontextmanager
async def _targets(
    service: Running, access: Access, params: dict[str, Any]
) -> AsyncIterator[tuple[list[Target], Model]]:
    """The service over gRPC or HTTP; with --protocols over both. gRPC says what the model is."""
    targets: list[Target] = []
    try:
        if "://" in service.address:
            if not params["model_name"]:
                raise ConfigError("over HTTP the model has to be named: give --model-name")
            model = Model(params["model_name"], params["vocab_size"], params["max_context"])
            targets.append(HttpTarget(service.address, model.name, access.token, params["tls_ca"]))
        else:
            grpc = GrpcTarget(service.address, token=access.token, credentials=access.credentials)
            targets.append(grpc)
            model = Model(*await grpc.facts())
        if params["protocols"]:
            url = params["http_server"] or service.http_url
            if url is None or "://" in service.address:
                raise ConfigError(
                    "--protocols needs gRPC as --server and the same service's URL as --http-server"
                )
            targets.append(HttpTarget(url, model.name, access.token, params["tls_ca"]))
        yield targets, model
    finally:
        for target in targets:
            await target.close()


def _scraping(service: Running, access: Access, params: dict[str, Any]) -> Callable[[], Scraper] | None:
    """What reads the server's metrics, where it is known where they are. Raises `ConfigError`."""
    base = service.address if "://" in service.address else params["http_server"] or service.http_url
    if not base:
        return None
    url = f"{base.rstrip('/').removesuffix('/v1')}/metrics"
    scraping = partial(Scraper, url, access.token, params["tls_ca"])
    scraping()  # is it one?
    return scraping
