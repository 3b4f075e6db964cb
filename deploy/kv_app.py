"""What `tandem audit` and `tandem bench kv` understand. The work is in deploy/commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from deploy import options as o

Internal = Annotated[
    str, typer.Argument(help="host:port of the router's internal listener, as `tandem serve --json` says.")
]
MaxObjects = Annotated[int, typer.Option("--limit", help="Most objects of the store to list.", min=1)]


def audit(server: Internal, limit: MaxObjects = 1000, json_output: o.Json = False) -> None:
    """Who owns what in every process of a running service, and what the KV store holds. Fails if books do
    not add up."""
    from deploy.commands import audit as command

    sys.exit(0 if command.run(server, limit, json_output) else 1)
