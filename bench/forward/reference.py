"""The same forwards by transformers' own modules, eagerly, on the same weights in the same dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from bench.forward.rig import TOKEN, timed


class Reference:
    """A `PreTrainedModel`; caches of sequences are made once per shape."""

    def __init__(self, path: Path, device: str, dtype: str) -> None:
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model = model.to(device)
        self._device = device
        self._caches: dict[tuple[int, int], Any] = {}

    def decode(self, batch: int, context: int) -> float:
        """Seconds of one step of `batch` sequences on top of `context` tokens each."""
        if (batch, context) not in self._caches:
            cache: Any = DynamicCache()
            self._forward(batch, context, cache)
            self._caches[batch, context] = cache
        cache = self._caches[batch, context]
        seconds = timed(lambda: self._forward(batch, 1, cache), self._device)
        cache.crop(-1)
        return seconds

    def prefill(self, num_tokens: int, batch: int = 1) -> float:
        """Seconds of `batch` prompts from nothing, with the logits of their last tokens."""
        return timed(lambda: self._forward(batch, num_tokens, DynamicCache()), self._device)

    @torch.inference_mode()
    def _forward(self, batch: int, num_tokens: int, cache: Any) -> None:
        ids = torch.full((batch, num_tokens), TOKEN, device=self._device)
        self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
