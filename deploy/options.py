"""The options that commands share, each with its help text. Every command pays for what is imported here."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from tandem.config import POLICIES
from tandem.quantizations import EIGHT_BITS, QUANTIZATIONS

Model = Annotated[
    str | None, typer.Option(help="Folder or hub id of a checkpoint; the bundled one by default.")
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of a draft model, or self, qspec, ngram, none; the bundled model has its own."
    ),
]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(version("tandem-serve"))
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Device = Annotated[str, typer.Option(help="What computes: cpu, cuda, or one of several GPUs as cuda:1.")]
Dtype = Annotated[str, typer.Option(help="Precision of activations and KV: float32, bfloat16 or float16.")]
Quantization = Annotated[
    str,
    typer.Option(
        help=f"Linear weights: {', '.join(QUANTIZATIONS)}. In bf16 activations are, too; from int8 on, with "
        f"{EIGHT_BITS} behind it (int8{EIGHT_BITS}), they have eight bits."
    ),
]
DraftQuantization = Annotated[
    str, typer.Option(help="The same for the draft's, or for a self-draft's; auto: what makes it fastest.")
]
Server = Annotated[
    str | None, typer.Option(help="host:port of a running service; without it one is started.")
]
LogLevel = Annotated[str, typer.Option(help="Of the service's processes: DEBUG, INFO, WARNING or ERROR.")]

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
HttpPort = Annotated[int, typer.Option(help="Port of the OpenAI API; 0 takes a free one.")]
BatchDir = Annotated[
    Path | None,
    typer.Option(help="Folder to keep clients' batches in; without one /v1/batches and /v1/files are off."),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="Bearer tokens that callers must show, one a line, each with tenant=NAME or not."),
]
TlsCert = Annotated[Path | None, typer.Option(help="PEM certificate chain of both listeners.")]
TlsKey = Annotated[Path | None, typer.Option(help="Its private key.")]
TlsClientCa = Annotated[
    Path | None, typer.Option(help="Let in only clients with a certificate of this authority.")
]
ShownKeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="File with the bearer token for --server in its first line."),
]
TlsCa = Annotated[Path | None, typer.Option(help="Call --server by TLS, and trust this authority.")]
ShownCert = Annotated[Path | None, typer.Option("--tls-cert", help="Certificate to show to --server.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Listen beyond this machine without tokens and TLS.")
]
Disaggregate = Annotated[
    str, typer.Option(help="Prompts to prefill workers: always, never, or auto, where that pays.")
]
ItlLimit = Annotated[
    float,
    typer.Option("--itl-limit", help="Seconds between tokens that auto tries to keep to; 0: none.", min=0),
]
Policy = Annotated[str, typer.Option(help=f"Which worker is next: {', '.join(POLICIES)}.")]
Prefills = Annotated[int, typer.Option(help="Number of prefill workers.", min=1)]
Decodes = Annotated[int, typer.Option(help="Number of decode workers.", min=1)]
OnRay = Annotated[
    bool, typer.Option("--ray", help="Run on Ray Serve: the cluster of RAY_ADDRESS, or one of this machine.")
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with any setting of the service.")]
Profile = Annotated[
    Path | None,
    typer.Option(help="Folder for a trace of each worker's first steps, and where their time went."),
]
ProfileSteps = Annotated[int, typer.Option(help="Steps that --profile records.", min=1)]
Try = Annotated[
    bool, typer.Option("--try", help="Send one prompt through the whole path and show where its time went.")
]

Prompts = Annotated[list[str] | None, typer.Argument(help="One or more prompts.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(help="Many prompts: JSONL with `prompt` or `token_ids`, or plain text lines; - for stdin."),
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
MinTokens = Annotated[int, typer.Option(help="Fewest tokens before the text may end.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")]
Penalty = Annotated[float, typer.Option(help="0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="1 is off.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")]
StopTokenIds = Annotated[list[int] | None, typer.Option(help="End at this token id; may be repeated.")]
N = Annotated[int, typer.Option("-n", help="Completions per prompt.")]
Logprobs = Annotated[int | None, typer.Option(help="Alternatives to report per token (with --json).")]
IgnoreEos = Annotated[bool, typer.Option(help="Go on past the end-of-text token.")]
Speculation = Annotated[str, typer.Option(help="How draft tokens are accepted: exact, auto or off.")]
AssistantTokens = Annotated[int | None, typer.Option(help="Draft tokens per step; what pays by default.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds to give up after.")]

PlanDtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; the service's by default.")]
PlanDraft = Annotated[
    str | None, typer.Option(help="Folder or hub id of a draft model, or self, to count beside the model.")
]
Context = Annotated[int | None, typer.Option(help="Tokens per request; the model's context by default.")]
Batch = Annotated[int, typer.Option(help="Requests at once.", min=1)]
Memory = Annotated[str, typer.Option(help="Memory of a decode worker for weights and KV, such as 80GiB.")]
BlockSize = Annotated[int, typer.Option(help="Tokens per KV block.", min=1)]

OneNode = Annotated[bool, typer.Option("--one-node", help="All on one machine, on loopback.")]
Gpus = Annotated[int, typer.Option(help="GPUs of each worker's pod.", min=0)]
Image = Annotated[str, typer.Option(help="Container image, such as deploy/Dockerfile makes.")]

Large = Annotated[str, typer.Option(help="Cost the bundled pair is grown to: 111m, 1b or 8b.")]
Fleet = Annotated[int, typer.Option(help="Workers of the simulation, half of each kind.", min=2)]
NumRequests = Annotated[int, typer.Option(help="Requests of the simulation.", min=1)]
NumStreams = Annotated[
    int, typer.Option(help="Measure a router process with so many streams at once instead; 2000 is the goal.")
]
PeerShape = Annotated[
    str, typer.Option(help="Model of the comparison: raw (the bundled one), 111m or 1b with random weights.")
]
Full = Annotated[bool, typer.Option("--full", help="Every combination: hours instead of minutes.")]
LongPrompts = Annotated[bool, typer.Option("--full", help="Prompts up to 32,768 tokens, and more memory.")]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only", help="Only what has this in its name, as 'raw draft' or 'batch 4'; may be given again."
    ),
]
Rounds = Annotated[int, typer.Option(help="Times each cell is measured.", min=1)]
Minutes = Annotated[float, typer.Option(help="Begin nothing new after this time.", min=0)]
Threads = Annotated[int, typer.Option(help="Compute threads.", min=1)]
OpenVinoPython = Annotated[
    Path | None, typer.Option(help="A Python that has openvino-genai and optimum-intel, to compare with it.")
]
VLlmPython = Annotated[Path | None, typer.Option(help="A Python that has vllm, to compare with it.")]
BenchProfile = Annotated[
    Path | None,
    typer.Option("--profile", help="Folder for traces of a few more steps, and where their time went."),
]
Out = Annotated[Path, typer.Option(help="Folder for the files.")]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw PNG plots; needs matplotlib.")]

FILES = ("api_key_file", "tls_ca", "tls_cert", "tls_key")  # those that name what to show a service
