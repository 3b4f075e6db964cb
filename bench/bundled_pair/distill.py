"""Distillation of the draft: the target's distribution on corpus text and on its own output.

Knows the loss, the pool of sampled continuations and the loop. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bundled_pair.batches import batches, chunks, evaluation_rows
from bench.bundled_pair.corpus import TokenArchive
from bench.bundled_pair.generate import continuations, prompts
from bench.bundled_pair.model import Llama, Shape
from bench.bundled_pair.optimizer import Optimizer, Rates
from bench.bundled_pair.runtime import Budget, autocast, compiled


@dataclass(frozen=True)
class DraftPlan:
    """One distillation: its length, its rows and the share of the target's own output in it."""

    steps: int = 7700
    minutes: float = float("inf")
    rows: int = 16
    length: int = 2048
    seed: int = 1
    argmax_weight: float = 0.3
    pool_batches: int = 3
    pool_rows: int = 6144
    pool_prompt: int = 64
    pool_steps: int = 448
    rates: Rates = field(default_factory=lambda: Rates(decay=0.2, adam=0.01))


def distillation_loss(draft: Tensor, target: Tensor, argmax_weight: float) -> Tensor:
    """KL from the target's distribution to the draft's, plus cross-entropy on the target's choice."""
    target, draft = target.float().flatten(0, -2), draft.float().flatten(0, -2)
    log_draft = draft.log_softmax(-1)
    divergence = F.kl_div(log_draft, target.log_softmax(-1), reduction="batchmean", log_target=True)
    return divergence + argmax_weight * F.nll_loss(log_draft, target.argmax(-1))


def pool_temperatures(rows: int, device: torch.device) -> Tensor:
    """Sampling temperatures over the rows of one pool batch: a third greedy, the rest up to 1."""
    kinds = torch.tensor([0.0, 0.7, 1.0], device=device)
    return kinds[torch.arange(rows, device=device) % 3]


def sample_pool(target: Llama, train: TokenArchive, plan: DraftPlan, device: torch.device) -> Tensor:
    """Continuations of training prompts by the target, as rows of tokens on the device."""
    rng = np.random.default_rng(plan.seed)
    generator = torch.Generator(device).manual_seed(plan.seed)
    pool = []
    for _ in range(plan.pool_batches):
        start = prompts(train, plan.pool_rows, plan.pool_prompt, rng, aligned=0.5).to(device)
        heat = pool_temperatures(plan.pool_rows, device)
        pool.append(continuations(target, start, plan.pool_steps, heat, generator).to(torch.int16))
    return torch.cat(pool)


def pool_batches(pool: Tensor, rows: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of the pool's rows in fresh orders."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in chunks(torch.randperm(len(pool), generator=generator), rows):
            if len(index) == rows:
                yield pool[index.to(pool.device)].long()


@torch.no_grad()
def teacher_forced_agreement(draft: Llama, target: Llama, data: TokenArchive, device: torch.device) -> float:
    """Share of positions of the archive at which both models' best tokens agree."""
    same, count = 0, 0
    for row in chunks(evaluation_rows(data, target.shape.context, device), 4):
        with autocast(device):
            equal = draft(row[:, :-1]).argmax(-1) == target(row[:, :-1]).argmax(-1)
        same, count = same + int(equal.sum()), count + equal.numel()
    return same / count


def train_draft(
    shape: Shape,
    plan: DraftPlan,
    target: Llama,
    train: TokenArchive,
    held_out: TokenArchive,
    device: torch.device,
    report: Callable[[str], None] = print,
) -> tuple[Llama, dict[str, float]]:
    """Distils a draft; every other step is on the target's own output."""
    torch.manual_seed(plan.seed)
    draft, budget = Llama(shape).to(device), Budget(plan.steps, plan.minutes)
    pool = sample_pool(target, train, plan, device)
    report(f"draft: pool of {pool.numel()} tokens after {budget.seconds():.0f} s")
    forward, teacher = compiled(draft, device), compiled(target, device)
    optimizer = Optimizer(draft, plan.rates)
    text = batches(train, plan.rows, plan.length - 1, plan.seed, device)
    own = pool_batches(pool, plan.rows * plan.length // pool.shape[1], plan.seed)
    seen = 0
    while (progress := budget.progress()) < 1:
        ids = next(own if budget.step % 2 else text)
        with autocast(device):
            with torch.no_grad():
                wanted = teacher(ids)
            logits = forward(ids)
        loss = distillation_loss(logits, wanted, plan.argmax_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(progress)
        budget.step, seen = budget.step + 1, seen + ids.numel()
        if budget.due(reports=10):
            share = teacher_forced_agreement(draft, target, held_out, device)
            report(
                f"draft step {budget.step}: loss {loss.item():.4f} agreement {share:.4f} "
                f"after {budget.seconds():.0f} s"
            )
    return draft.eval(), {"steps": budget.step, "tokens_seen": seen, "pool_tokens": pool.numel()}
