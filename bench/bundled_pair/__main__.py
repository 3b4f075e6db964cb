"""`python -m bench.bundled_pair`: corpus, target, draft and figures, from nothing by one command.

Knows the order of the stages and the command line; each stage's work is in a module of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.bundled_pair.checkpoint import load, rounding_error, save
from bench.bundled_pair.corpus import TokenArchive, build, load_archive
from bench.bundled_pair.distill import DraftPlan, train_draft
from bench.bundled_pair.evaluate import evaluate
from bench.bundled_pair.model import DRAFT, TARGET, Llama
from bench.bundled_pair.training import Plan, train_target
from bench.bundled_pair.unloop import UnloopPlan, unloop

STAGES = ("corpus", "target", "draft", "evaluate")
SHARES = {"target": 0.45, "unloop": 0.15, "draft": 0.4}  # of --minutes
LARGEST_ROUNDING = 0.1  # logits


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    stages: tuple[str, ...]
    work: Path
    out: Path
    device: torch.device
    scale: float
    minutes: float
    seed: int

    def archives(self) -> tuple[TokenArchive, TokenArchive]:
        """The training archive and the held-out one."""
        return load_archive(self.work, "train"), load_archive(self.work, "heldout")

    def steps(self, full: int) -> int:
        """A stage's steps, scaled with the target's."""
        return max(1, round(full * self.scale))

    def finish(self, name: str, model: Llama, held_out: TokenArchive, figures: dict[str, float]) -> None:
        """Stores a model, after checking that fp16 keeps its logits."""
        ids = torch.from_numpy(held_out.tokens[: model.shape.context].astype("int64"))[None]
        error = rounding_error(model, ids)
        if error > LARGEST_ROUNDING:
            raise SystemExit(f"storing the {name} in fp16 moves a logit by {error:.3f}")
        save(self.out / name, model, self.work / "tokenizer.json")
        text = json.dumps({**figures, "fp16_largest_logit_change": error}, indent=2)
        (self.work / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {text}", flush=True)


def make_target(run: Run) -> None:
    """Trains the target, tunes it against loops and stores it."""
    train, held_out = run.archives()
    plan = Plan(minutes=run.minutes * SHARES["target"], seed=run.seed)
    plan = replace(plan, steps=run.steps(plan.steps))
    tuning = UnloopPlan(minutes=run.minutes * SHARES["unloop"], seed=run.seed + 2)
    tuning = replace(tuning, steps=run.steps(tuning.steps))
    model, figures = train_target(TARGET, plan, train, held_out, run.device)
    figures |= unloop(model, tuning, train, run.device)
    run.finish("target", model, held_out, figures)


def make_draft(run: Run) -> None:
    """Distils the draft from the stored target and stores it."""
    train, held_out = run.archives()
    plan = DraftPlan(minutes=run.minutes * SHARES["draft"], seed=run.seed + 1)
    plan = replace(plan, steps=run.steps(plan.steps))
    if run.scale < 1 or run.device.type == "cpu":  # a pool in keeping with the run
        plan = replace(plan, pool_rows=max(plan.rows * 4, round(plan.pool_rows * min(run.scale, 0.1))))
    target = load(run.out / "target").to(run.device)
    model, figures = train_draft(DRAFT, plan, target, train, held_out, run.device)
    run.finish("draft", model, held_out, figures)


def measure(run: Run) -> None:
    """Writes every figure of the stored pair to figures.json, with the list of held-out files."""
    figures = evaluate(run.out, run.work, run.device)
    (run.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    shutil.copyfile(run.work / "heldout.txt", run.out / "heldout.txt")
    print(json.dumps(figures, indent=2))


def parse() -> Run:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.bundled_pair", description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--work", type=Path, default=Path(".work/bundled_pair"), help="corpus and figures")
    parser.add_argument("--out", type=Path, default=Path("tandem/models"), help="where the pair is stored")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=Plan().steps, help="steps of the target; others scale")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit on all training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return Run(
        stages=tuple(options.stages),
        work=options.work,
        out=options.out,
        device=torch.device(options.device),
        scale=options.steps / Plan().steps,
        minutes=options.minutes,
        seed=options.seed,
    )


def main() -> None:
    """Runs the stages that were asked for, in their order."""
    run = parse()
    torch.set_float32_matmul_precision("high")
    if "corpus" in run.stages:
        build(run.work)
    if "target" in run.stages:
        make_target(run)
    if "draft" in run.stages:
        make_draft(run)
    if "evaluate" in run.stages:
        torch.set_float32_matmul_precision("highest")
        measure(run)


if __name__ == "__main__":
    main()
