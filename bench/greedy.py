"""Transformers' `generate` as every comparison asks for it: greedy, and so many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def complete(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int, **options: Any) -> torch.Tensor:
    """`[prompts, num_tokens]` ids after prompts of one length, so that nothing is padded."""
    ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        found: torch.Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return found[:, ids.shape[1] :]
