"""Muon for the hidden matrices and AdamW for the rest, with one schedule.

Knows parameters and gradients only.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rates:
    """Peak learning rates, weight decay and the warm-up share of a run."""

    muon: float = 0.02
    adam: float = 0.004
    decay: float = 0.1
    momentum: float = 0.95
    warm_up: float = 0.02


def schedule(progress: float, warm_up: float) -> float:
    """The factor on the peak rates: a linear warm-up, then a linear decay to zero."""
    if progress < warm_up:
        return progress / warm_up
    return max(0.0, (1.0 - progress) / (1.0 - warm_up))


def orthogonalize(update: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices of a stack."""
    x = update.bfloat16() if update.is_cuda else update.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    out: Tensor = x.mT if tall else x
    return out


class Optimizer:
    """Both optimizers behind one `step`."""

    def __init__(self, model: nn.Module, rates: Rates) -> None:
        self.rates = rates
        self.groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                self.groups[parameter.shape].append(parameter)
            else:
                others.append(parameter)
        self.momenta = {size: torch.stack([p.detach() for p in ps]) * 0 for size, ps in self.groups.items()}
        self.adam = torch.optim.AdamW(others, lr=rates.adam, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """One update at the given share of the run; clears the gradients."""
        factor = schedule(progress, self.rates.warm_up)
        for group in self.adam.param_groups:
            group["lr"] = self.rates.adam * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for size, parameters in self.groups.items():
            self._muon(parameters, self.momenta[size], factor * self.rates.muon)

    def _muon(self, parameters: list[nn.Parameter], momentum: Tensor, rate: float) -> None:
        gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
        momentum.lerp_(gradient, 1 - self.rates.momentum)
        update = orthogonalize(gradient.lerp_(momentum, self.rates.momentum)).to(gradient.dtype)
        rows, columns = gradient.shape[-2:]
        scale = rate * max(1.0, rows / columns) ** 0.5
        for parameter, change in zip(parameters, update.unbind(), strict=True):
            parameter.mul_(1 - rate * self.rates.decay).add_(change, alpha=-scale)
            parameter.grad = None
