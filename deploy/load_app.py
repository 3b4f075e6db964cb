"""What `tandem bench serve`, `split`, `goodput` and `overhead`, `compare` and `report` understand."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy import options as o

Server = Annotated[
    str | None,
    typer.Option(help="host:port of a Tandem service, or the URL of any OpenAI-compatible one."),
]
HttpServer = Annotated[
    str | None, typer.Option(help="URL of the same service's HTTP, for --protocols and its metrics.")
]
Protocols = Annotated[
    bool, typer.Option("--protocols", help="Send the same over HTTP, too: what does it cost beside gRPC?")
]
ModelName = Annotated[str, typer.Option(help="Over HTTP: the model's name in requests.")]
VocabSize = Annotated[
    int, typer.Option(help="Over HTTP: synthetic prompts have token ids below this.", min=2)
]
MaxContext = Annotated[int, typer.Option(help="Over HTTP: longest prompt plus output, in tokens.", min=2)]
Requests = Annotated[int, typer.Option(help="Requests to send; of a file, at most this many.", min=1)]
ArrivalKind = Annotated[
    str, typer.Option(help="closed, burst, constant, poisson, gamma, ramp, or trace (as the file says).")
]
Rate = Annotated[float, typer.Option(help="Requests per second; where a ramp or a search begins.")]
RampTo = Annotated[float, typer.Option(help="Requests per second at the end of a ramp.")]
Burstiness = Annotated[float, typer.Option(help="Of gamma arrivals: 1 is Poisson, less comes in clumps.")]
Concurrency = Annotated[int, typer.Option(help="Requests at once in the closed loop.", min=1)]
Input = Annotated[
    Path | None,
    typer.Option("--input", help="Mooncake trace, ShareGPT, request JSONL or text; else synthetic prompts."),
]
Lengths = Annotated[
    str, typer.Option(help="Tokens: 128, uniform:16-512, lognormal:256,0.6 or mix:96*4,1536.")
]
PrefixShare = Annotated[
    float, typer.Option(help="Share of every prompt that others begin with too.", min=0, max=1)
]
Prefixes = Annotated[int, typer.Option(help="How many such beginnings there are.", min=1)]
CancelShare = Annotated[float, typer.Option(help="Share of requests the client cancels.", min=0, max=1)]
CancelAfter = Annotated[float, typer.Option(help="Seconds after which it does.", min=0)]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--slo",
        help="Limits: ttft=500ms,itl=50ms,tpot=40ms,e2e=9s; of one class batch:e2e=30s. May be repeated.",
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(help="Synthetic: interactive:share=0.8,input=uniform:16-512,output=64. May be repeated."),
]
Turns = Annotated[str, typer.Option(help="Of each conversation: 4, uniform:2-6. Synthetic, or ShareGPT's.")]
ThinkTime = Annotated[float, typer.Option(help="Seconds between turns, on average.", min=0)]
WarmUp = Annotated[int, typer.Option(help="Requests before the run that do not count.", min=0)]
Seed = Annotated[int, typer.Option(help="Of prompts, arrivals and cancellations.")]
Search = Annotated[bool, typer.Option("--max-goodput", help="Search the highest rate within the limits.")]
Trials = Annotated[int, typer.Option(help="Runs at each rate of a search.", min=1)]
Attainment = Annotated[float, typer.Option(help="Share of requests that must meet the limits.", min=0, max=1)]

Result = Annotated[Path, typer.Argument(help="Folder or serve.json of a `tandem bench serve`.")]
Margin = Annotated[float, typer.Option(help="Share by which a figure may get worse.", min=0)]

Seconds = Annotated[float, typer.Option(help="Of arrivals in each cell.", min=1)]
GoodputShape = Annotated[
    str, typer.Option(help="Model of the comparison: raw (the bundled one) or 111m with random weights.")
]
GrownShape = Annotated[
    str,
    typer.Option(help="The bundled model as it is (raw), or grown to the cost of a larger one (111m, …)."),
]
Weights = Annotated[str, typer.Option("--quantization", help="Kind of the model's weights: bf16, int8, …")]
VLlmSteps = Annotated[
    list[int] | None,
    typer.Option(
        "--vllm-step-tokens",
        help="One more vLLM whose steps compute at most so many tokens, so that long prompts come in chunks "
        "between others' tokens. May be repeated.",
        min=64,
    ),
]
VLlmDefaults = Annotated[bool, typer.Option(help="vLLM with its own number of tokens a step, too.")]
NamedLimits = Annotated[
    list[str] | None,
    typer.Option("--limits", help="Only within these: loose, middle, tight. May be repeated."),
]
Quantized = Annotated[
    list[str] | None,
    typer.Option("--quantization", help="Ourselves with such weights (int8, nf4, …), too. May be repeated."),
]
Speculating = Annotated[
    bool, typer.Option("--speculation", help="Ourselves with a draft, too; with --shape raw.")
]
Rates = Annotated[list[float] | None, typer.Option("--rate", help="Requests per second; may be repeated.")]


def serve(
    context: typer.Context,
    server: Server = None,
    api_key_file: o.ShownKeyFile = None,
    tls_ca: o.TlsCa = None,
    model: o.Model = None,
    draft: o.Draft = None,
    http_server: HttpServer = None,
    protocols: Protocols = False,
    model_name: ModelName = "",
    vocab_size: VocabSize = 1000,
    max_context: MaxContext = 2048,
    num_requests: Requests = 100,
    arrival: ArrivalKind = "closed",
    rate: Rate = 1.0,
    ramp_to: RampTo = 10.0,
    burstiness: Burstiness = 1.0,
    concurrency: Concurrency = 8,
    input_file: Input = None,
    input_tokens: Lengths = "128",
    output_tokens: Lengths = "64",
    prefix_share: PrefixShare = 0.0,
    num_prefixes: Prefixes = 1,
    cancel_share: CancelShare = 0.0,
    cancel_after: CancelAfter = 1.0,
    request_class: Classes = None,
    turns: Turns = "1",
    think_time: ThinkTime = 1.0,
    slo: Limits = None,
    warm_up: WarmUp = 4,
    seed: Seed = 0,
    max_goodput: Search = False,
    trials: Trials = 3,
    attainment: Attainment = 0.9,
    out: o.Out = Path("bench-results/serve"),
    json_output: o.Json = False,
) -> None:
    """Load-test a service: latencies from the schedule, goodput under limits, where the time went."""
    _load_test(context.params, max_goodput, out, json_output)


def _load_test(params: dict[str, Any], with_search: bool, out: Path, as_json: bool) -> None:
    from deploy.commands import load as command

    command.run(params, with_search, out, as_json)


def split(
    shape: GrownShape = "raw",
    quantization: Weights = "none",
    seconds: Seconds = 12.0,
    rates: Rates = None,
    out: o.Out = Path("bench-results/split"),
    json_output: o.Json = False,
) -> None:
    """Prefill and decode apart, together, and apart where it pays, under the same mixed load."""
    from bench.split import RATES, run

    document = run(shape, quantization, seconds, rates or RATES, out, json_output)
    if json_output:
        print(json.dumps(document))


def goodput(
    shape: GoodputShape = "111m",
    vllm_python: o.VLlmPython = None,
    vllm_steps: VLlmSteps = None,
    vllm_defaults: VLlmDefaults = True,
    limits: NamedLimits = None,
    quantization: Quantized = None,
    speculation: Speculating = False,
    num_requests: Requests = 40,
    trials: Trials = 1,
    minutes: o.Minutes = 14.0,
    out: o.Out = Path("bench-results/goodput"),
    json_output: o.Json = False,
) -> None:
    """The largest rate of mixed prompts within limits, of the whole service and of vLLM's server."""
    from bench.goodput.run import Comparison, run

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what sleeps must not outlive us
    comparison = Comparison(
        shape,
        vllm_python,
        (*([None] if vllm_defaults else []), *(vllm_steps or ())),
        speculation,
        num_requests,
        trials,
        minutes,
        out,
        tuple(limits or ()),
        tuple(quantization or ()),
    )
    document = run(comparison, json_output)
    if json_output:
        print(json.dumps(document))


def overhead(
    shape: GrownShape = "raw",
    rounds: o.Rounds = 5,
    out: o.Out = Path("bench-results/overhead"),
    json_output: o.Json = False,
) -> None:
    """Tokens per second through the whole service beside the engine's bare loop."""
    from bench.overhead import run

    document = run(shape, rounds, out, json_output)
    if json_output:
        print(json.dumps(document))


def compare(a: Result, b: Result, margin: Margin = 0.05, json_output: o.Json = False) -> None:
    """Is run B worse than run A, by more than chance and the margin? Ends with 1 if it is."""
    from deploy.commands import load as command

    sys.exit(command.compare_runs(a, b, margin, json_output))


def render(result: Result) -> None:
    """Write serve.csv and serve.html of a run again, from its serve.json."""
    from deploy.commands import load as command

    command.render(result)
