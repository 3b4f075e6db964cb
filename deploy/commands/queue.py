"""`tandem queue`: a file of requests in, one record for every line out, whatever happens between."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.access import access_of
from deploy.queue.display import Display
from tandem.errors import ConfigError
from tandem.offline.job import InUseError, Job, check_paths, holder, load_job, locked, save_job
from tandem.offline.journal import StorageError
from tandem.offline.look import facts, in_input_order, known_job
from tandem.offline.progress import Snapshot
from tandem.offline.runner import Limits

EXIT_IN_USE, EXIT_STORAGE = 3, 4
STARTED_S = 150.0
CANCEL_S = 30.0
LOOK_EVERY_S = 0.5


def submit(
    input_: Path,
    output: Path,
    service: dict[str, Any],
    defaults: dict[str, Any],
    limits: Limits,
    as_json: bool,
) -> int:
    """Start a queue and run it to its end; returns the exit code. Raises `ConfigError`."""
    known = load_job(output)
    if known is not None and known.is_checked:
        raise ConfigError(
            f"{output} has a queue already; go on with: tandem queue resume {input_} --output {output}"
        )
    return _run(_new_job(input_, service, defaults), output, limits, as_json)


def resume(
    input_: Path,
    output: Path,
    service: dict[str, Any],
    defaults: dict[str, Any],
    limits: Limits,
    as_json: bool,
) -> int:
    """Go on where a run ended, however it ended. A queue that had not begun begins."""
    job = load_job(output) or _new_job(input_, service, defaults)
    if job.is_cancelled:
        raise ConfigError(f"the queue of {output} was cancelled; give a new --output")
    if service["queue"] and not job.queue:
        raise ConfigError(f"the queue of {output} was started without --queue; leave it out")
    given = {name: value for name, value in service.items() if value not in (None, "none", "float32")}
    job = replace(job, input=str(input_.resolve()), service={**job.service, **given})
    return _run(job, output, limits, as_json)


def _new_job(input_: Path, service: dict[str, Any], defaults: dict[str, Any]) -> Job:
    job = Job(str(input_.resolve()), defaults, service, time.time())
    if not service["queue"]:
        return job
    name = service["name"] or f"queue-{secrets.token_hex(4)}"
    return replace(job, queue=name, owner=secrets.token_hex(16))


def _run(job: Job, output: Path, limits: Limits, as_json: bool) -> int:
    from deploy.queue.session import Session

    err = Console(stderr=True, highlight=False, soft_wrap=True)
    check_paths(Path(job.input), output)
    try:
        with locked(output):
            save_job(output, job)
            code = asyncio.run(Session(job, output, service_of(job.service), limits, err).run())
    except InUseError as error:
        err.print(f"error: {error}")
        return EXIT_IN_USE
    except StorageError as error:
        err.print(f"error: {error.message}")
        return EXIT_STORAGE
    if as_json:
        print(json.dumps(facts(output)))
    return code


def service_of(options: dict[str, Any]) -> Any:
    """The service that a command's options name."""
    from deploy.queue.serving import Service

    access = access_of(options)
    if access.server is not None:
        from deploy.models import resolve_model

        path = resolve_model(options["model"]) if options["model"] else None
        return Service(access, None, path)
    from deploy.settings import load_config

    named = ("model", "draft", "device", "dtype", "quantization", "draft_quantization")
    config = load_config(None, **{name: options[name] for name in named})
    return Service(access, config, config.model.path)


def detach(output: Path, as_json: bool) -> int:
    """The same command again, in the background; returns when it runs or has failed."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    log = output.with_name(output.name + ".log")
    with log.open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    deadline_s = time.monotonic() + STARTED_S
    while process.poll() is None and time.monotonic() < deadline_s:
        job = load_job(output)
        if job is not None and job.progress and holder(output) == process.pid:
            break
        time.sleep(LOOK_EVERY_S / 5)
    if process.returncode:
        print(log.read_text().splitlines()[-1], file=sys.stderr)
        return process.returncode
    if as_json:
        print(json.dumps({"output": str(output), "pid": process.pid, "log": str(log)}))
    else:
        print(f"runs in process {process.pid}; follow it with: tandem queue watch {output}")
    return 0


def status(output: Path, as_json: bool) -> None:
    """How far a queue is. Raises `ConfigError` if there is none."""
    found = facts(output)
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:12} {'' if value is None else value}")


def watch(output: Path, as_json: bool) -> int:
    """Follow a queue that another process runs, to its end."""
    job = known_job(output)
    with Display(output.name, job.total, Console(stderr=True, highlight=False)) as display:
        while holder(output) is not None:
            job = known_job(output)
            if job.progress:
                display.show(Snapshot(**job.progress))
            time.sleep(LOOK_EVERY_S)
    found = facts(output)
    said = f"{found['state']}: {found['completed']} of {found['total']} completed, {found['failed']} failed"
    print(json.dumps(found) if as_json else said)
    return 0 if found["state"] == "finished" and not found["failed"] else 1


def results(output: Path, with_errors: bool, as_json: bool) -> None:
    """Records in the order of the input: texts, or whole records. Raises `ConfigError` if there are none."""
    known_job(output)
    for record in in_input_order(output, with_errors=with_errors):
        print(json.dumps(record) if as_json else _as_text(record))


def cancel(output: Path, as_json: bool) -> None:
    """Stop the runner, if there is one, and close the queue for good. Finished records stay."""
    known_job(output)
    if (pid := holder(output)) is not None:
        os.kill(pid, signal.SIGTERM)
        deadline_s = time.monotonic() + CANCEL_S
        while holder(output) is not None and time.monotonic() < deadline_s:
            time.sleep(LOOK_EVERY_S / 5)
    with locked(output):
        job = replace(known_job(output), is_cancelled=True)
        save_job(output, job)
    if job.queue:
        from tandem.offline.shared.queue import SharedQueue

        shared = SharedQueue(job.service["queue"], job.queue)
        shared.check_server()
        shared.end("cancelled")
    status(output, as_json)


def _as_text(record: dict[str, Any]) -> str:
    name = record["custom_id"]
    if record["error"] is not None:
        return f"── {name}: error: {record['error']['code']}: {record['error']['message']}"
    choices = record["response"]["body"]["choices"]
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
    return "\n".join(f"── {name}\n{text}" for text in texts)
