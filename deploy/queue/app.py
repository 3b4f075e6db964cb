"""What `tandem queue` understands. The work is in deploy/commands/queue.py, loaded when called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy import options as o

app = typer.Typer(no_args_is_help=True, help="Run a file of requests; every line gets one record.")

Requests = Annotated[
    Path, typer.Argument(help="OpenAI Batch JSONL, JSONL with prompt or messages, or plain text.")
]
Output = Annotated[Path, typer.Option(help="File for the results; failures go to *.errors.jsonl beside it.")]
Queue = Annotated[Path | None, typer.Argument(help="The file that was given as --output.")]
SameOutput = Annotated[Path | None, typer.Option("--output", help="The same, by its name.")]
RedisUrl = Annotated[
    str | None, typer.Option(help="redis://… to share the queue with runners on other machines.")
]
QueueName = Annotated[str | None, typer.Option(help="What the queue is called there.")]
Detach = Annotated[bool, typer.Option("--detach", help="Run in the background.")]
InFlight = Annotated[int, typer.Option(help="Most requests at once; fewer when the service is full.", min=1)]
Attempts = Annotated[int, typer.Option(help="Times a line may fail before it is a failure.", min=1)]
Patience = Annotated[float, typer.Option(help="Seconds to wait for a service that is away.", min=0)]
MaxTokens = Annotated[int, typer.Option(help="Most tokens for lines that are prompts only.", min=1)]
Temperature = Annotated[float, typer.Option(help="For lines that are prompts only; 0 is greedy.")]
WithErrors = Annotated[bool, typer.Option("--errors", help="Failures, too.")]


def _parts(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The options by what they are about: the service, lines that are prompts only, limits."""
    from tandem.offline.runner import Limits

    named = (
        "server",
        "model",
        "draft",
        "device",
        "dtype",
        "quantization",
        "draft_quantization",
        "queue",
        "name",
    )
    files = {name: str(options[name].resolve()) if options[name] else None for name in o.FILES}
    defaults = {name: options[name] for name in ("max_tokens", "temperature")}
    limits = Limits(options["max_in_flight"], options["max_attempts"], options["patience"])
    return {**{name: options[name] for name in named}, **files}, defaults, limits


def _which(queue_file: Path | None, output: Path | None) -> Path:
    chosen = queue_file or output
    if chosen is None:
        raise typer.BadParameter("name the queue by the file that was given as --output")
    return chosen


def _where(url: str | None, name: str | None) -> tuple[str, str]:
    if url is None or name is None:
        raise typer.BadParameter("name a queue in Redis by --queue URL and --name NAME")
    return url, name


@app.command()
def submit(
    context: typer.Context,
    requests: Requests,
    output: Output,
    detach: Detach = False,
    queue: RedisUrl = None,
    name: QueueName = None,
    server: o.Server = None,
    api_key_file: o.ShownKeyFile = None,
    tls_ca: o.TlsCa = None,
    tls_cert: o.ShownCert = None,
    tls_key: o.TlsKey = None,
    model: o.Model = None,
    draft: o.Draft = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    draft_quantization: o.DraftQuantization = "auto",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    max_in_flight: InFlight = 64,
    max_attempts: Attempts = 3,
    patience: Patience = 600.0,
    json_output: o.Json = False,
) -> None:
    """Start a queue and run it. Ends with 0, or 1: requests failed, 2: bad lines, 3: in use, 4: disk full."""
    from deploy.commands import queue as command

    if detach:
        sys.exit(command.detach(output, json_output))
    sys.exit(command.submit(requests, output, *_parts(context.params), json_output))


@app.command()
def resume(
    context: typer.Context,
    requests: Requests,
    output: Output,
    detach: Detach = False,
    queue: RedisUrl = None,
    name: QueueName = None,
    server: o.Server = None,
    api_key_file: o.ShownKeyFile = None,
    tls_ca: o.TlsCa = None,
    tls_cert: o.ShownCert = None,
    tls_key: o.TlsKey = None,
    model: o.Model = None,
    draft: o.Draft = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    draft_quantization: o.DraftQuantization = "auto",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    max_in_flight: InFlight = 64,
    max_attempts: Attempts = 3,
    patience: Patience = 600.0,
    json_output: o.Json = False,
) -> None:
    """Go on where a queue ended, however it ended, with the service and sampling it was started with."""
    from deploy.commands import queue as command

    if detach:
        sys.exit(command.detach(output, json_output))
    sys.exit(command.resume(requests, output, *_parts(context.params), json_output))


@app.command()
def work(
    context: typer.Context,
    queue: RedisUrl = None,
    name: QueueName = None,
    server: o.Server = None,
    api_key_file: o.ShownKeyFile = None,
    tls_ca: o.TlsCa = None,
    tls_cert: o.ShownCert = None,
    tls_key: o.TlsKey = None,
    model: o.Model = None,
    draft: o.Draft = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    draft_quantization: o.DraftQuantization = "auto",
    max_in_flight: InFlight = 64,
    max_attempts: Attempts = 3,
    patience: Patience = 600.0,
) -> None:
    """Join a queue in Redis that another process was started with, and work on it to its end."""
    from deploy.commands import shared_queue as command

    options = {**context.params, "max_tokens": None, "temperature": None}
    service, _, limits = _parts(options)
    sys.exit(command.work(*_where(queue, name), service, limits))


@app.command()
def status(
    queue_file: Queue = None,
    output: SameOutput = None,
    queue: RedisUrl = None,
    name: QueueName = None,
    json_output: o.Json = False,
) -> None:
    """How far a queue is."""
    if queue is not None:
        from deploy.commands import shared_queue

        shared_queue.status(*_where(queue, name), json_output)
        return
    from deploy.commands import queue as command

    command.status(_which(queue_file, output), json_output)


@app.command()
def watch(
    queue_file: Queue = None,
    output: SameOutput = None,
    queue: RedisUrl = None,
    name: QueueName = None,
    json_output: o.Json = False,
) -> None:
    """Follow a queue that runs in the background, or in Redis."""
    if queue is not None:
        from deploy.commands import shared_queue

        sys.exit(shared_queue.watch(*_where(queue, name), json_output))
    from deploy.commands import queue as command

    sys.exit(command.watch(_which(queue_file, output), json_output))


@app.command()
def results(
    queue_file: Queue = None,
    output: SameOutput = None,
    errors: WithErrors = False,
    json_output: o.Json = False,
) -> None:
    """What came out, in the order of the input; with --json whole records."""
    from deploy.commands import queue as command

    command.results(_which(queue_file, output), errors, json_output)


@app.command()
def cancel(
    queue_file: Queue = None,
    output: SameOutput = None,
    queue: RedisUrl = None,
    name: QueueName = None,
    json_output: o.Json = False,
) -> None:
    """Stop a queue for good; what is finished stays."""
    if queue is not None:
        from deploy.commands import shared_queue

        shared_queue.cancel(*_where(queue, name), json_output)
        return
    from deploy.commands import queue as command

    command.cancel(_which(queue_file, output), json_output)
