"""What `tandem audit` and `tandem bench kv` understand. The work is in deploy/commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy import options as o
from tandem.geometry import KV_CODECS

Internal = Annotated[
    str, typer.Argument(help="host:port of the router's internal listener, as `tandem serve --json` says.")
]
Verified = Annotated[
    str | None,
    typer.Argument(
        help="host:port of a service's internal listener; without it one is started for each codec. Name the "
        "service's own --model, --draft and --config."
    ),
]
Codecs = Annotated[
    list[str] | None,
    typer.Option("--codec", help=f"Without a service: {', '.join(KV_CODECS)}; all by default."),
]
NumPrompts = Annotated[int, typer.Option("--prompts", help="Prompts of mixed length.", min=2)]
PromptTokens = Annotated[int, typer.Option("--tokens", help="Tokens of the longest prompt.", min=1)]
Forced = Annotated[int, typer.Option("--forced", help="Tokens forced behind each prompt.", min=2)]
MaxObjects = Annotated[int, typer.Option("--limit", help="Most objects of the store to list.", min=1)]


Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", help="URL of a store; may be repeated. Memory, shm and disk by default."),
]
Million = Annotated[bool, typer.Option("--full", help="Up to a million objects, which takes gigabytes.")]
Whole = Annotated[
    str | None,
    typer.Option(
        metavar="SHAPE",
        help="Instead: whole requests to services of raw, 111m or 1b that keep KV in each backend, in turns; "
        "memory and shm by default.",
    ),
]


def bench_kv(
    backends: Backends = None,
    rounds: o.Rounds = 5,
    full: Million = False,
    whole: Whole = None,
    out: o.Out = Path("bench-results/kv"),
    json_output: o.Json = False,
) -> None:
    """How fast KV crosses the store, next to plain gRPC and a copy in memory; what a cached prefix saves."""
    from bench.kv import run
    from bench.kv import whole as whole_requests

    if whole is not None:
        document = whole_requests.run(backends or [], whole, rounds, out, json_output)
    else:
        document = run.run(backends or [], rounds, out, full, json_output)
    if json_output:
        print(json.dumps(document))


def audit(
    server: Internal, limit: MaxObjects = 1000, config: o.ConfigFile = None, json_output: o.Json = False
) -> None:
    """Who owns what in every process of a running service, and what the KV store holds.

    Fails if books do not add up. For a service with internal.tls_cert name its --config.
    """
    from deploy.commands import audit as command
    from deploy.settings import load_config
    from tandem.internal import LOOPBACK_ONLY, InternalPlane

    plane = InternalPlane.of(load_config(config)) if config else LOOPBACK_ONLY
    sys.exit(0 if command.run(server, limit, json_output, plane) else 1)


def verify(
    context: typer.Context,
    server: Verified = None,
    model: o.Model = None,
    draft: o.Draft = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    config: o.ConfigFile = None,
    codecs: Codecs = None,
    num_prompts: NumPrompts = 8,
    num_tokens: PromptTokens = 256,
    num_forced: Forced = 32,
    json_output: o.Json = False,
) -> None:
    """Compare KV that crossed the store with a recompute here, logit by logit; try whether damage is noticed.

    Fails if KV does not arrive as it was computed.
    """
    from deploy.commands import verify as command
    from deploy.settings import config_of, named_options

    settings = config_of(config, context.params, named_options(context))
    size = command.Size(num_prompts, num_tokens, num_forced)
    sys.exit(0 if command.run(settings, server, codecs or KV_CODECS, size, json_output) else 1)
