"""What `tandem eval` understands: one command per experiment, all with the same options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from deploy import options as o

SAMPLES, GPU_SAMPLES = 16, 500  # the latter as published
Shape = Annotated[
    str, typer.Option(help="The bundled pair as it was trained (raw), or grown to a cost: 111m, 1b or 8b.")
]
Target = Annotated[str | None, typer.Option(help="Folder or hub id of a target instead of the bundled one.")]
DraftModel = Annotated[str | None, typer.Option(help="Folder or hub id of its draft model.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        help="Texts to take samples from: a line each, or JSONL with `text`; one data source per file. "
        "The bundled pair's held-out text by default."
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        help=f"Samples to decode, or to read; {SAMPLES} by default, {GPU_SAMPLES} on a GPU.",
        min=1,
        show_default=False,
    ),
]
Few = Annotated[int, typer.Option(help="Samples to decode, or to read.", min=1)]
Log = Annotated[
    str | None, typer.Option("--log", help="Also to tensorboard:DIR or wandb:PROJECT, where installed.")
]
Page = Annotated[
    Path | None,
    typer.Option(help="The page with all tables; docs/results.md of a checkout, else results.md in --out."),
]

HELP = {
    "speculation": "Speculation by k and τ: throughput, latency, rollbacks, acceptance, speed-up.",
    "quantized-pairs": "Target and draft in 8 and 4 bits: the same figures at k = 3, τ = 0.2.",
    "quantization": "A target in 16, 8 and 4 bits without a draft: speed and perplexity.",
    "gamma": "γ draft tokens per step: speed-up beside theory from measured costs; by data source.",
    "qspec": "Four-bit weights that draft with 4- and 8-bit activations: speed, acceptance, fidelity.",
    "quality": "Programs and paths by a target in 16, 8 and 4 bits, on tasks that need no file.",
    "forward": "Time against batch, input and output length, with and without a KV cache.",
    "split": "Prefill and decode apart and together on the same cores: TTFT, ITL, goodput under mixed load.",
}
FOLDER = Path("bench-results/eval")

experiments = typer.Typer(
    no_args_is_help=True, help="The experiments of the field, with published figures beside ours."
)


def _command(name: str) -> Callable[..., None]:
    def command(
        context: typer.Context,
        shape: Shape = "raw",
        target: Target = None,
        draft: DraftModel = None,
        text: Texts = None,
        samples: Samples = None,
        rounds: o.Rounds = 3,
        threads: o.Threads = 2,
        device: o.Device = "cpu",
        minutes: o.Minutes = 10.0,
        out: o.Out = FOLDER,
        plots: o.Plots = True,
        log: Log = None,
        json_output: o.Json = False,
    ) -> None:
        from deploy.commands import eval as commands

        chosen = {"samples": samples or (SAMPLES if device == "cpu" else GPU_SAMPLES)}
        commands.run(name, context.params | chosen, out, plots, json_output)

    return command


for _name, _help in HELP.items():
    experiments.command(_name, help=_help)(_command(_name))


@experiments.command("all")
def everything(
    context: typer.Context,
    shape: Shape = "raw",
    target: Target = None,
    draft: DraftModel = None,
    text: Texts = None,
    samples: Few = 8,
    rounds: o.Rounds = 8,
    threads: o.Threads = 2,
    device: o.Device = "cpu",
    minutes: o.Minutes = 13.0,
    out: o.Out = FOLDER,
    page: Page = None,
    plots: o.Plots = True,
    log: Log = None,
    json_output: o.Json = False,
) -> None:
    """Every experiment on small settings within a time, and one page with all tables."""
    from deploy.commands import eval as commands

    commands.run_all(context.params, minutes, out, page, plots, json_output)
