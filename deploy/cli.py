"""The `tandem` command: what it understands. The work is in deploy/commands, loaded when called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tandem.errors import ConfigError, TandemError

app = typer.Typer(
    name="tandem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a large language model with prefill and decode on separate workers.",
)

EXIT_FAILED = 1
EXIT_USAGE = 2

Model = Annotated[
    str | None, typer.Option(help="Folder or hub id of a checkpoint; the bundled one by default.")
]
Draft = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of a draft model, ngram, or none; the bundled model has its own."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Dtype = Annotated[str, typer.Option(help="Precision of activations and KV: float32, bfloat16 or float16.")]
Server = Annotated[
    str | None, typer.Option(help="host:port of a running service; without it one is started.")
]
LogLevel = Annotated[str, typer.Option(help="Log level of the service's processes.")]


@app.command()
def serve(
    model: Model = None,
    draft: Draft = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 50051,
    prefill: Annotated[int, typer.Option(help="Number of prefill workers.", min=1)] = 1,
    decode: Annotated[int, typer.Option(help="Number of decode workers.", min=1)] = 1,
    dtype: Dtype = "float32",
    config: Annotated[Path | None, typer.Option(help="YAML file with any setting of the service.")] = None,
    try_prompt: Annotated[
        bool,
        typer.Option("--try", help="Send one prompt through the whole path and show where its time went."),
    ] = False,
    log_level: LogLevel = "WARNING",
) -> None:
    """Start the service on this machine and keep it running until Ctrl-C."""
    from deploy.commands import serve as command
    from deploy.settings import load_config

    settings = load_config(config, model=model, draft=draft, dtype=dtype, host=host, port=port)
    command.run(settings, prefill, decode, try_prompt, log_level)


@app.command()
def demo(model: Model = None, draft: Draft = None, json_output: Json = False) -> None:
    """Send eight prompts at once through the whole path, show the completions, and stop."""
    from deploy.commands import demo as command
    from deploy.settings import load_config

    sys.exit(command.run(load_config(None, model=model, draft=draft), json_output))


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="Many prompts: JSONL with `prompt` or `token_ids`, or plain text lines; - for stdin."
        ),
    ] = None,
    server: Server = None,
    model: Model = None,
    draft: Draft = None,
    dtype: Dtype = "float32",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    min_tokens: Annotated[int, typer.Option(help="Fewest tokens before the text may end.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    n: Annotated[int, typer.Option("-n", help="Completions per prompt.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="Alternatives to report per token (with --json).")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on past the end-of-text token.")] = False,
    speculation: Annotated[
        str, typer.Option(help="How draft tokens are accepted: exact, auto or off.")
    ] = "exact",
    num_assistant_tokens: Annotated[int | None, typer.Option(help="Draft tokens per step.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to give up after.")] = None,
    json_output: Json = False,
) -> None:
    """Complete prompts. The text goes to standard output, everything else to standard error."""
    from deploy.commands import generate as command
    from deploy.settings import load_config
    from tandem.sampling import SamplingParams
    from tandem.speculation import parse_speculation

    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        n=n,
        logprobs=logprobs,
        ignore_eos=ignore_eos,
    )
    asking = command.Asking(sampling, parse_speculation(speculation, num_assistant_tokens), timeout)
    wanted = command.read_prompts(prompts or [], prompt_file)
    settings = None if server else load_config(None, model=model, draft=draft, dtype=dtype)
    sys.exit(command.run(wanted, asking, server, settings, json_output))


@app.command()
def plan(
    model: Model = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; the service's by default.")
    ] = "float32",
    context: Annotated[
        int | None, typer.Option(help="Tokens per request; the model's context by default.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 1,
    memory: Annotated[
        str, typer.Option(help="Memory of a decode worker for weights and KV, such as 80GiB.")
    ] = "",
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.")] = 16,
    json_output: Json = False,
) -> None:
    """Does it fit? KV bytes per token and per request, how many requests fit, the longest that fits."""
    from deploy.commands import plan as command

    command.run(model, dtype, context, batch, memory, block_size, json_output)


def main() -> None:
    """Entry point: errors become one line that says what, why and what to do."""
    try:
        app()
    except ConfigError as error:
        _complain(str(error), EXIT_USAGE)
    except TandemError as error:
        _complain(str(error), EXIT_USAGE if error.code.http_status == 400 else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(message: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)
