"""Tuning of the target against loops: unlikelihood on the repetitions of its own greedy output.

The tuned weights are blended with the weights before: part of the way takes most of the loops and
costs little of the loss on text. Knows what a repetition is and the tuning loop. Knows nothing of
files or of the draft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bundled_pair.batches import batches
from bench.bundled_pair.corpus import TokenArchive
from bench.bundled_pair.generate import continuations, prompts
from bench.bundled_pair.model import Llama
from bench.bundled_pair.optimizer import Optimizer, Rates
from bench.bundled_pair.runtime import Budget, autocast, compiled

LONGEST_PERIOD = 40
SHORTEST_REPEAT = 6
LOOP_TAIL = 48


@dataclass(frozen=True)
class UnloopPlan:
    """One tuning: steps, rows of text and of own output, and how often the output is drawn anew."""

    steps: int = 260
    minutes: float = float("inf")
    rows: int = 16
    length: int = 2048
    seed: int = 2
    weight: float = 0.5
    blend: float = 0.4
    own_rows: int = 64
    own_prompt: int = 48
    own_steps: int = 176
    refresh: int = 16
    rates: Rates = field(default_factory=lambda: Rates(muon=0.002, adam=0.0005, decay=0.5))


def repeated(ids: Tensor) -> Tensor:
    """Marks the tokens that complete or continue a repetition in rows of tokens.

    A token is marked when it and the tokens before it, a full period and SHORTEST_REPEAT at the
    least, equal the tokens one period earlier.
    """
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for period in range(1, min(LONGEST_PERIOD, ids.shape[1] // 2) + 1):
        window = max(period, SHORTEST_REPEAT)
        equal = F.pad((ids[:, period:] == ids[:, :-period]).int().cumsum(1), (1, 0))
        marks[:, period + window - 1 :] |= equal[:, window:] - equal[:, :-window] == window
    return marks


def looping(ids: Tensor) -> Tensor:
    """Whether each row ends in a loop: LOOP_TAIL tokens with a period of LONGEST_PERIOD at most."""
    tail = ids[:, -LOOP_TAIL:]
    periods = range(1, min(LONGEST_PERIOD, ids.shape[1] - LOOP_TAIL) + 1)
    return torch.stack([(tail == ids[:, -LOOP_TAIL - p : -p]).all(1) for p in periods]).any(0)


def unlikelihood(logits: Tensor, ids: Tensor, marks: Tensor) -> Tensor:
    """Mean of -log(1 - p) of the marked tokens."""
    chosen = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0].exp()
    losses = -torch.log1p(-chosen.clamp(max=1 - 1e-4))
    return (losses * marks).sum() / marks.sum().clamp(min=1)


def own_output(model: Llama, train: TokenArchive, plan: UnloopPlan, rng: np.random.Generator) -> Tensor:
    """Greedy continuations of training prompts, enough for the steps until the next refresh."""
    start = prompts(train, plan.own_rows * plan.refresh, plan.own_prompt, rng, aligned=0.5)
    start = start.to(model.cos.device)
    model.eval()
    out = continuations(model, start, plan.own_steps, torch.zeros(len(start), device=start.device))
    model.train()
    return out


def unloop(
    model: Llama,
    plan: UnloopPlan,
    train: TokenArchive,
    device: torch.device,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Tunes the model in place: cross-entropy on text and unlikelihood on its own repetitions."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward, optimizer = compiled(model, device), Optimizer(model, plan.rates)
    source = batches(train, plan.rows, plan.length, plan.seed, device)
    rng, budget = np.random.default_rng(plan.seed), Budget(plan.steps, plan.minutes)
    output = torch.empty(0)
    while (progress := budget.progress()) < 1:
        turn = budget.step % plan.refresh
        if turn == 0:
            output = own_output(model, train, plan, rng)
            if budget.due(reports=10):
                share = looping(output[:, plan.own_prompt :]).float().mean().item()
                report(f"unloop step {budget.step}: {share:.3f} loop after {budget.seconds():.0f} s")
        rows, own = next(source), output[turn * plan.own_rows : (turn + 1) * plan.own_rows]
        marks = repeated(own)[:, 1:]
        marks[:, : plan.own_prompt] = False
        with autocast(device):
            text_logits, own_logits = forward(rows[:, :-1]), model(own[:, :-1])
        loss = F.cross_entropy(text_logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss = loss + plan.weight * unlikelihood(own_logits, own[:, 1:], marks)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(progress)
        budget.step += 1
    after = model.state_dict()
    model.load_state_dict({name: value.lerp(after[name], plan.blend) for name, value in before.items()})
    model.eval()
    return {"unloop_steps": budget.step, "unloop_tokens_seen": budget.step * plan.rows * plan.length}
