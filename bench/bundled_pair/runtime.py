"""What both training runs share: budget, precision and compilation.

Knows the device. Knows nothing of losses or data.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Budget:
    """Counts steps and time; the schedule follows whichever is further on."""

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.minutes, self.step, self.began = steps, minutes, 0, time.monotonic()

    def progress(self) -> float:
        """The share of the run that is over; 1 or more ends it."""
        return max(self.step / self.steps, self.seconds() / 60 / self.minutes)

    def seconds(self) -> float:
        """The time since the run began."""
        return time.monotonic() - self.began

    def due(self, reports: int) -> bool:
        """Whether one of about `reports` evenly spaced reports is due after this step."""
        return self.step % max(1, self.steps // reports) == 0


def autocast(device: torch.device) -> torch.autocast:
    """bf16 for matrix products on a GPU; fp32 throughout on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def compiled(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model's forward pass, compiled where that pays."""
    return torch.compile(model, dynamic=False) if device.type == "cuda" else model
