"""`tandem quality`: one task by a running service or one that is started, its figures and its files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from bench.measure import console
from bench.quality import report
from bench.quality.model import ServedModel
from bench.quality.run import Results, check, evaluate, is_sound
from bench.quality.task import Task
from deploy.access import access_of
from deploy.commands.running import serving
from deploy.settings import config_of

NO_MODEL = "the known answers"


def ask(task: Task, params: dict[str, Any], samples: int) -> int:
    """Ask a model, or with `check` nobody. Returns the exit code. Raises `ConfigError` and `TandemError`."""
    if params["check"]:
        results, model = asyncio.run(check(task)), NO_MODEL
        _leave(results, params, model)
        return 0 if is_sound(results) else 1
    results, model = asyncio.run(_ask(task, params, samples))
    _leave(results, params, model)
    return 0


async def _ask(task: Task, params: dict[str, Any], samples: int) -> tuple[Results, str]:
    access = access_of(params)
    config = None if access.server else config_of(None, params)
    async with serving(access.server, config) as service, access.client(service.address) as client:
        name = (await client.models())[0].name
        model = ServedModel(client, params["concurrency"])
        return await evaluate(task, model, samples, params["seed"]), name


def perplexity(params: dict[str, Any]) -> None:
    """Of a text, by the engine in this process. Raises `ConfigError`."""
    from bench.quality.perplexity import measure

    config = config_of(None, params)
    results = measure(
        params["input_file"],
        config.model.path,
        stride=params["stride"],
        max_length=params["max_length"],
        limit=params["limit"],
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=params["device"],
    )
    _leave(results, params, config.model.served_name)


def _leave(results: Any, params: dict[str, Any], model: str) -> None:
    out: Path = params["out"]
    told = ("out", "json_output", "server", "api_key_file", "tls_ca", "tls_cert", "tls_key")
    options = {name: value for name, value in params.items() if name not in told}
    content = report.document(results, options, model)
    report.save(out, results, content)
    shown = console(params["json_output"])
    report.show(results, content, shown)
    shown.print(f"\nquality.json, quality.csv and quality.md are in {out}")
    if params["json_output"]:
        print(
            json.dumps({name: value for name, value in content.items() if name not in ("items", "windows")})
        )
