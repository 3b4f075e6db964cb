"""What `tandem audit` and `tandem bench kv` understand. The work is in deploy/commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy import options as o

Internal = Annotated[
    str, typer.Argument(help="host:port of the router's internal listener, as `tandem serve --json` says.")
]
MaxObjects = Annotated[int, typer.Option("--limit", help="Most objects of the store to list.", min=1)]


Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", help="URL of a store; may be repeated. Memory, shm and disk by default."),
]
Million = Annotated[bool, typer.Option("--full", help="Up to a million objects, which takes gigabytes.")]


def bench_kv(
    backends: Backends = None,
    rounds: o.Rounds = 5,
    full: Million = False,
    out: o.Out = Path("bench-results/kv"),
    json_output: o.Json = False,
) -> None:
    """How fast KV crosses the store, next to plain gRPC and a copy in memory; what a cached prefix saves."""
    from bench.kv.run import run

    document = run(backends or [], rounds, out, full, json_output)
    if json_output:
        print(json.dumps(document))


def audit(server: Internal, limit: MaxObjects = 1000, json_output: o.Json = False) -> None:
    """Who owns what in every process of a running service, and what the KV store holds. Fails if books do
    not add up."""
    from deploy.commands import audit as command

    sys.exit(0 if command.run(server, limit, json_output) else 1)
