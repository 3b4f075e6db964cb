"""Training of the target: next-token cross-entropy over the corpus.

Knows the loop, its budget and the validation loss. Knows nothing of files or of the draft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from bench.bundled_pair.batches import batches, chunks, evaluation_rows
from bench.bundled_pair.corpus import TokenArchive
from bench.bundled_pair.model import Llama, Shape
from bench.bundled_pair.optimizer import Optimizer, Rates
from bench.bundled_pair.runtime import Budget, autocast, compiled


@dataclass(frozen=True)
class Plan:
    """One run: how long, on what rows, with which regularisation."""

    steps: int = 5000
    minutes: float = float("inf")
    rows: int = 16
    length: int = 2048
    dropout: float = 0.1
    seed: int = 0
    rates: Rates = field(default_factory=lambda: Rates(decay=0.5, adam=0.01))


@torch.no_grad()
def validation_loss(model: Llama, data: TokenArchive, device: torch.device) -> float:
    """Mean loss in nats per token over the archive, in rows of the full context."""
    model.eval()
    total, count = 0.0, 0
    for row in chunks(evaluation_rows(data, model.shape.context, device), 8 if device.type == "cuda" else 1):
        with autocast(device):
            logits = model(row[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum").item()
        count += row[:, 1:].numel()
    model.train()
    return total / count


def train_target(
    shape: Shape,
    plan: Plan,
    train: TokenArchive,
    held_out: TokenArchive,
    device: torch.device,
    report: Callable[[str], None] = print,
) -> tuple[Llama, dict[str, float]]:
    """Trains a target; returns it with the figures of the run."""
    torch.manual_seed(plan.seed)
    model = Llama(shape, plan.dropout).to(device)
    forward, optimizer = compiled(model, device), Optimizer(model, plan.rates)
    source = batches(train, plan.rows, plan.length, plan.seed, device)
    budget = Budget(plan.steps, plan.minutes)
    while (progress := budget.progress()) < 1:
        rows = next(source)
        with autocast(device):
            logits = forward(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(progress)
        budget.step += 1
        if budget.due(reports=12):
            report(
                f"target step {budget.step}: train {loss.item():.4f} "
                f"held-out {validation_loss(model, held_out, device):.4f} after {budget.seconds():.0f} s"
            )
    model.eval()
    return model, {
        "steps": budget.step,
        "tokens_seen": budget.step * plan.rows * plan.length,
        "passes": budget.step * plan.rows * plan.length / len(train.tokens),
        "train_loss_last": loss.item(),
    }
