"""A Llama with random weights on a device, run by our engine and by transformers: one set for both.

No checkpoint is written. The linear layers stay torch's own; ours is what lies between them: packed ragged
rows and the paged cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import greedy
from bench.forward.rig import timed
from bench.speculation.text import Tokens
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.engine.paged_cache import PagedCache
from tandem.engine.transformers_decoder import ATTENTION, TransformersDecoder
from tandem.geometry import ModelGeometry, num_blocks

BLOCK_SIZE = 16
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
    "1b": {  # Llama 3.2 1B
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    },
    "8b": {  # Llama 3.1 8B
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    },
}


class RandomModel:
    """Room for `max_sequences` of `max_tokens` each."""

    def __init__(self, shape: str, device: str, max_sequences: int, max_tokens: int) -> None:
        self.device = device
        self.dtype = "bfloat16" if device == "cuda" else "float32"
        torch.manual_seed(0)
        config = LlamaConfig(
            **SHAPES[shape], max_position_embeddings=8192, bos_token_id=None, eos_token_id=None
        )
        with torch.device(device):
            self._model: Any = LlamaForCausalLM._from_config(  # type: ignore[no-untyped-call]
                config, dtype=getattr(torch, self.dtype), attn_implementation=ATTENTION
            )
        self._model.eval().requires_grad_(False)
        self.geometry = ModelGeometry.from_config(config.to_dict())
        self._blocks_each = num_blocks(max_tokens, BLOCK_SIZE)
        cache = PagedCache(
            self.geometry,
            max_sequences * self._blocks_each,
            BLOCK_SIZE,
            getattr(torch, self.dtype),
            device,
        )
        decoder = TransformersDecoder(self._model, {}, "random weights")
        self.runner = ModelRunner(decoder, self.geometry, cache, {})

    @property
    def step_bytes(self) -> int:
        """Of the weights that a decode step reads: all but the rows of the embedding that nobody asks for."""
        linears = (m for m in self._model.modules() if isinstance(m, torch.nn.Linear))
        return sum(m.weight.numel() * m.weight.element_size() for m in linears)

    def ours(self, prompts: Sequence[Tokens], num_tokens: int) -> tuple[float, float, list[Tokens]]:
        """Seconds to the first tokens, seconds of all further ones, and the tokens."""
        tables = [range(i * self._blocks_each, (i + 1) * self._blocks_each) for i in range(len(prompts))]
        outputs: list[list[int]] = []

        def prefill() -> None:
            rows = [SequenceRows(prompt, 0, table) for prompt, table in zip(prompts, tables, strict=True)]
            outputs[:] = [[token] for token in self.runner.choose(rows)]

        def decode() -> None:
            for step in range(num_tokens - 1):
                rows = [
                    SequenceRows(output[-1:], len(prompt) + step, table)
                    for prompt, output, table in zip(prompts, outputs, tables, strict=True)
                ]
                for output, token in zip(outputs, self.runner.choose(rows), strict=True):
                    output.append(token)

        return timed(prefill, self.device), timed(decode, self.device), [tuple(o) for o in outputs]

    def theirs(self, prompts: Sequence[Tokens], num_tokens: int) -> tuple[float, float, list[Tokens]]:
        """The same by `generate`: a first run of one token, then one of all."""
        with self._sdpa():
            first_s, _ = self._generate(prompts, 1)
            whole_s, outputs = self._generate(prompts, num_tokens)
        return first_s, max(whole_s - first_s, 1e-9), outputs

    def _generate(self, prompts: Sequence[Tokens], num_tokens: int) -> tuple[float, list[Tokens]]:
        found: list[torch.Tensor] = []
        seconds = timed(lambda: found.append(greedy.complete(self._model, prompts, num_tokens)), self.device)
        return seconds, [tuple(row) for row in found[0].tolist()]

    @contextmanager
    def _sdpa(self) -> Iterator[None]:
        """Transformers' own attention instead of ours."""
        self._model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self._model.set_attn_implementation(ATTENTION)
