"""The `tandem` command: what it understands. The work is in deploy/commands, loaded when called."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from deploy import eval_app, kv_app, load_app
from deploy import options as o
from deploy.quality_app import quality
from deploy.queue.app import app as queue
from tandem.errors import ConfigError, TandemError

app = typer.Typer(
    name="tandem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a large language model with prefill and decode on separate workers.",
)
bench = typer.Typer(no_args_is_help=True, help="Experiments: a table, CSV, JSON and plots from one command.")
EXIT_FAILED = 1
EXIT_USAGE = 2


@app.callback()
def options(show_version: o.Version = False) -> None:
    """Of `tandem` itself, before any command."""


@app.command()
def serve(
    context: typer.Context,
    model: o.Model = None,
    draft: o.Draft = None,
    host: o.Host = "127.0.0.1",
    port: o.Port = 50051,
    http_port: o.HttpPort = 8000,
    batch_dir: o.BatchDir = None,
    api_key_file: o.ApiKeyFile = None,
    tls_cert: o.TlsCert = None,
    tls_key: o.TlsKey = None,
    tls_client_ca: o.TlsClientCa = None,
    insecure: o.Insecure = False,
    prefill: o.Prefills = 1,
    decode: o.Decodes = 1,
    device: o.Device = "cpu",
    dtype: o.Dtype = "float32",
    quantization: o.Quantization = "none",
    draft_quantization: o.DraftQuantization = "auto",
    policy: o.Policy = "least-loaded",
    disaggregate: o.Disaggregate = "always",
    itl_limit_s: o.ItlLimit = 0.0,
    config: o.ConfigFile = None,
    on_ray: o.OnRay = False,
    profile: o.Profile = None,
    profile_steps: o.ProfileSteps = 128,
    try_prompt: o.Try = False,
    log_level: o.LogLevel = "WARNING",
    json_output: o.Json = False,
) -> None:
    """Start the service and keep it running until Ctrl-C: on this machine, or on Ray."""
    from deploy.commands import serve as command
    from deploy.profile import with_profile
    from deploy.settings import config_of, named_options

    settings = config_of(config, context.params, named_options(context))
    settings = with_profile(settings, profile, profile_steps)
    command.run(settings, prefill, decode, try_prompt, log_level, json_output, on_ray)


@app.command()
def demo(model: o.Model = None, draft: o.Draft = None, json_output: o.Json = False) -> None:
    """Send eight prompts at once through the whole path, show the completions, and stop."""
    from deploy.commands import demo as command
    from deploy.settings import load_config

    sys.exit(command.run(load_config(None, model=model, draft=draft), json_output))


@app.command()
def generate(
    context: typer.Context,
    prompts: o.Prompts = None,
    prompt_file: o.PromptFile = None,
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
    max_tokens: o.MaxTokens = 128,
    min_tokens: o.MinTokens = 0,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.RepetitionPenalty = 1.0,
    presence_penalty: o.Penalty = 0.0,
    frequency_penalty: o.Penalty = 0.0,
    seed: o.Seed = None,
    stop: o.Stop = None,
    stop_token_ids: o.StopTokenIds = None,
    n: o.N = 1,
    logprobs: o.Logprobs = None,
    ignore_eos: o.IgnoreEos = False,
    speculation: o.Speculation = "exact",
    num_assistant_tokens: o.AssistantTokens = None,
    timeout: o.Timeout = None,
    json_output: o.Json = False,
) -> None:
    """Complete prompts. The text goes to standard output, everything else to standard error."""
    from deploy.commands import generate as command

    sys.exit(command.run_options(context.params))


@app.command()
def plan(
    model: o.Model = None,
    draft: o.PlanDraft = None,
    dtype: o.PlanDtype = "float32",
    quantization: o.Quantization = "none",
    draft_quantization: o.DraftQuantization = "auto",
    context: o.Context = None,
    batch: o.Batch = 1,
    memory: o.Memory = "",
    block_size: o.BlockSize = 16,
    json_output: o.Json = False,
) -> None:
    """Does it fit? KV bytes per token and per request, how many requests fit, the longest that fits."""
    from deploy.commands import plan as command

    side = command.Sides.of(model, draft, dtype, quantization, draft_quantization)
    command.run(side, context, batch, memory, block_size, json_output)


@app.command()
def deploy(
    model: o.Model = None,
    draft: o.Draft = None,
    prefill: o.Prefills = 1,
    decode: o.Decodes = 1,
    port: o.Port = 50051,
    http_port: o.HttpPort = 8080,
    one_node: o.OneNode = False,
    gpus: o.Gpus = 0,
    image: o.Image = "tandem:latest",
    out: o.Out = Path("."),
    json_output: o.Json = False,
) -> None:
    """Write the files for a Ray cluster: Serve's config, and a KubeRay RayService."""
    from deploy.commands import deploy as command

    args = command.arguments(
        model=model, draft=draft, prefill=prefill, decode=decode, port=port, http_port=http_port
    )
    command.run(args, one_node, gpus, image, out, json_output)


@bench.command("speculation")
def bench_speculation(
    large: o.Large = "111m",
    full: o.Full = False,
    rounds: o.Rounds = 3,
    minutes: o.Minutes = 14.0,
    threads: o.Threads = 2,
    openvino_python: o.OpenVinoPython = None,
    only: o.Only = None,
    quantization: o.Quantization = "none",
    profile: o.BenchProfile = None,
    out: o.Out = Path("bench-results/speculation"),
    plots: o.Plots = True,
    json_output: o.Json = False,
) -> None:
    """What speculation earns over plain decoding, how often drafts agree, and what others do."""
    from deploy.commands import bench as command

    python, named = openvino_python, tuple(only or ())
    command.speculation(
        large, full, rounds, minutes, threads, python, profile, named, quantization, out, plots, json_output
    )


@bench.command("kernels")
def bench_kernels(
    rounds: o.Rounds = 5,
    threads: o.Threads = 2,
    out: o.Out = Path("bench-results/kernels"),
    json_output: o.Json = False,
) -> None:
    """Every linear kernel against fp32 F.linear, by shape, rows and threads."""
    from deploy.commands import bench as command

    command.kernels(rounds, threads, out, json_output)


@bench.command("peers")
def bench_peers(
    shape: o.PeerShape = "111m",
    rounds: o.Rounds = 3,
    threads: o.Threads = 2,
    openvino_python: o.OpenVinoPython = None,
    vllm_python: o.VLlmPython = None,
    profile: o.BenchProfile = None,
    out: o.Out = Path("bench-results/peers"),
    json_output: o.Json = False,
) -> None:
    """Prefill and decode beside transformers, OpenVINO GenAI and vLLM, and how far the limits are."""
    from deploy.commands import bench as command

    command.peers(shape, rounds, threads, openvino_python, vllm_python, profile, out, json_output)


@bench.command("forward")
def bench_forward(
    shape: o.PeerShape = "111m",
    full: o.LongPrompts = False,
    rounds: o.Rounds = 3,
    threads: o.Threads = 2,
    device: o.Device = "cpu",
    profile: o.BenchProfile = None,
    out: o.Out = Path("bench-results/forward"),
    plots: o.Plots = True,
    json_output: o.Json = False,
) -> None:
    """Decode steps and prefills of the engine alone, beside the machine's limits and transformers."""
    from deploy.commands import bench as command

    command.forward(shape, full, rounds, threads, device, profile, out, plots, json_output)


@bench.command("router")
def bench_router(
    workers: o.Fleet = 1000,
    requests: o.NumRequests = 200_000,
    streams: o.NumStreams = 0,
    rounds: o.Rounds = 3,
    out: o.Out = Path("bench-results/router"),
    json_output: o.Json = False,
) -> None:
    """What the router itself costs: its decisions on a virtual clock, or its streams with a null engine."""
    from deploy.commands import bench as command

    command.router(workers, requests, streams, rounds, out, json_output)


bench.command("kv")(kv_app.bench_kv)
bench.command("serve")(load_app.serve)
bench.command("split")(load_app.split)
bench.command("goodput")(load_app.goodput)
bench.command("overhead")(load_app.overhead)
app.add_typer(queue, name="queue")
app.command("audit")(kv_app.audit)
app.command("verify")(kv_app.verify)
app.add_typer(bench, name="bench")
app.command("compare")(load_app.compare)
app.command("report")(load_app.render)
app.add_typer(eval_app.experiments, name="eval")
app.add_typer(quality, name="quality")


def main() -> None:
    """Entry point: errors become one line that says what, why and what to do."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC tells of every connection that ends otherwise
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


if __name__ == "__main__":
    main()
