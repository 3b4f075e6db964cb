"""What `tandem quality` understands: what a model's answers are worth, one command per task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy import options as o

quality = typer.Typer(
    no_args_is_help=True, help="What a model's answers are worth: code, sums, choices, text, paths."
)

Problems = Annotated[Path, typer.Option("--input", help="The benchmark's file.")]
HumanEvalFile = Annotated[
    Path | None,
    typer.Option("--input", help="HumanEval's JSONL, or .jsonl.gz; else ten problems of our own."),
]
Examples = Annotated[
    Path | None, typer.Option(help="File of solved problems, of which the prompt shows some.")
]
Shots = Annotated[int, typer.Option(help="How many it shows.", min=1)]
Limit = Annotated[int | None, typer.Option(help="Only the first so many.", min=1)]
Samples = Annotated[
    int,
    typer.Option(help="Sampled answers of each problem beside the greedy one: T 0.7, top_p 0.95.", min=0),
]
Seed = Annotated[int, typer.Option(help="Of samples, and of what is drawn.")]
Concurrency = Annotated[int, typer.Option(help="Requests at once.", min=1)]
Check = Annotated[
    bool,
    typer.Option("--check", help="Grade the known answers, not a model's; ends with 1 if unsound."),
]
Count = Annotated[int, typer.Option(help="Graphs.", min=1)]
Nodes = Annotated[int, typer.Option(help="Nodes of each.", min=4)]
NumPaths = Annotated[int, typer.Option(help="Paths to find in each.", min=1)]
Stride = Annotated[int, typer.Option(help="Tokens a window moves on by.", min=1)]
MaxLength = Annotated[int, typer.Option(help="Tokens of a window; at most the model's context.", min=2)]


@quality.command("humaneval")
def humaneval(
    context: typer.Context,
    input_file: HumanEvalFile = None,
    limit: Limit = None,
    samples: Samples = 1,
    server: o.Server = None,
    api_key_file: o.ShownKeyFile = None,
    tls_ca: o.TlsCa = None,
    model: o.Model = None,
    draft: o.Draft = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    seed: Seed = 0,
    concurrency: Concurrency = 8,
    check: Check = False,
    out: o.Out = Path("bench-results/quality/humaneval"),
    json_output: o.Json = False,
) -> None:
    """Functions to write, and their tests in a sandbox: pass@1, and pass@k with more samples."""
    from bench.quality import code
    from deploy.commands import quality as command

    sys.exit(command.ask(code.humaneval(input_file, limit), context.params, samples))


@quality.command("mbpp")
def mbpp(
    context: typer.Context,
    input_file: Problems,
    limit: Limit = None,
    samples: Samples = 0,
    server: o.Server = None,
    api_key_file: o.ShownKeyFile = None,
    tls_ca: o.TlsCa = None,
    model: o.Model = None,
    draft: o.Draft = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    seed: Seed = 0,
    concurrency: Concurrency = 8,
    check: Check = False,
    out: o.Out = Path("bench-results/quality/mbpp"),
    json_output: o.Json = False,
) -> None:
    """Programs from a description and three tests, run in a sandbox."""
    from bench.quality import code
    from deploy.commands import quality as command

    sys.exit(command.ask(code.mbpp(input_file, limit), context.params, samples))


@quality.command("gsm8k")
def gsm8k(
    context: typer.Context,
    input_file: Problems,
    examples: Examples = None,
    shots: Shots = 8,
    limit: Limit = None,
    samples: Samples = 0,
    server: o.Server = None,
    api_key_file: o.ShownKeyFile = None,
    tls_ca: o.TlsCa = None,
    model: o.Model = None,
    draft: o.Draft = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    seed: Seed = 0,
    concurrency: Concurrency = 8,
    check: Check = False,
    out: o.Out = Path("bench-results/quality/gsm8k"),
    json_output: o.Json = False,
) -> None:
    """Word problems whose answer is one number: exact match."""
    from bench.quality import gsm8k as task
    from deploy.commands import quality as command

    sys.exit(command.ask(task.gsm8k(input_file, examples, shots, limit), context.params, samples))


@quality.command("mmlu")
def mmlu(
    context: typer.Context,
    input_file: Problems,
    examples: Examples = None,
    shots: Shots = 5,
    limit: Limit = None,
    server: o.Server = None,
    api_key_file: o.ShownKeyFile = None,
    tls_ca: o.TlsCa = None,
    model: o.Model = None,
    draft: o.Draft = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    concurrency: Concurrency = 8,
    check: Check = False,
    out: o.Out = Path("bench-results/quality/mmlu"),
    json_output: o.Json = False,
) -> None:
    """Multiple choice, by the log-likelihood of the letters."""
    from bench.quality import mmlu as task
    from deploy.commands import quality as command

    params = {**context.params, "seed": 0}  # nothing is drawn
    sys.exit(command.ask(task.mmlu(input_file, examples, shots, limit), params, samples=0))


@quality.command("paths")
def paths(
    context: typer.Context,
    count: Count = 50,
    nodes: Nodes = 8,
    num_paths: NumPaths = 3,
    samples: Samples = 0,
    server: o.Server = None,
    api_key_file: o.ShownKeyFile = None,
    tls_ca: o.TlsCa = None,
    model: o.Model = None,
    draft: o.Draft = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    seed: Seed = 0,
    concurrency: Concurrency = 8,
    check: Check = False,
    out: o.Out = Path("bench-results/quality/paths"),
    json_output: o.Json = False,
) -> None:
    """The best simple paths of drawn graphs, answered by a tool call. Needs no data."""
    from bench.quality import paths as task
    from deploy.commands import quality as command

    sys.exit(command.ask(task.best_paths(count, nodes, num_paths, seed), context.params, samples))


@quality.command("perplexity")
def perplexity(
    context: typer.Context,
    input_file: Problems,
    stride: Stride = 512,
    max_length: MaxLength = 2048,
    limit: Limit = None,
    model: o.Model = None,
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    device: o.Device = "cpu",
    out: o.Out = Path("bench-results/quality/perplexity"),
    json_output: o.Json = False,
) -> None:
    """Perplexity of a text, such as WikiText's wiki.test.raw, in overlapping windows."""
    from deploy.commands import quality as command

    command.perplexity(context.params)
