"""What HTTP costs beside gRPC: the same requests over both to one service, compared one by one.

Over gRPC everything was sent once before, so that both sides find the same beginnings cached.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from bench.serve.compare import LATENCIES, MIN_REQUESTS, compare
from bench.serve.session import LoadTest, Options, Run
from tandem.errors import ConfigError


def check_comparable(options: Options) -> None:
    """Raises `ConfigError` for what cannot be sent over both, or is too little to compare."""
    if options.num_requests < MIN_REQUESTS:
        raise ConfigError(f"a comparison of protocols needs at least {MIN_REQUESTS} requests: --num-requests")
    if not options.talk.is_one and options.input is None:
        raise ConfigError("conversations of token ids need gRPC: for --protocols, give text as --input")


async def protocol_cost(grpc: LoadTest, http: LoadTest) -> dict[str, Any]:
    """One more run over each."""
    documents, cpu_ms = {}, {}
    for name, test in (("http", http), ("grpc", grpc)):
        began_s = time.process_time()
        run = await test.run()
        cpu_ms[name] = round(1e3 * (time.process_time() - began_s) / len(run.records), 3)
        documents[name] = _document(test, run)
    found = compare(documents["grpc"], documents["http"], margin=0.0)
    return {
        "requests": len(documents["grpc"]["records"]),
        "same_texts": found.same_texts,
        "changes": [asdict(change) for change in found.changes if change.figure in LATENCIES],
        "client_cpu_ms": cpu_ms,
        "warnings": found.warnings,
    }


def sentence(found: dict[str, Any]) -> str:
    """The cost in one line."""
    changes = (
        f"{one['figure'].removesuffix('_ms').upper()} {one['a']:.2f} to {one['b']:.2f} ms "
        f"(request by request {one['change']:+.1%}, 95 %: {one['low']:+.1%} to {one['high']:+.1%})"
        for one in found["changes"]
    )
    cpu, same = found["client_cpu_ms"], found["same_texts"]
    texts = (
        "no texts to compare"
        if same is None
        else f"equal texts in {same:.1%} of {found['requests']} requests"
    )
    return (
        f"HTTP beside gRPC: {texts}; medians {', '.join(changes)}; "
        f"client CPU {cpu['grpc']:.2f} to {cpu['http']:.2f} ms per request"
    )


def _document(test: LoadTest, run: Run) -> dict[str, Any]:
    return {
        "options": test.options.to_json(),
        "summary": run.summary,
        "records": [record.to_json() for record in run.records],
    }
