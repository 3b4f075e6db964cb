"""Runs transformers' own modules: every architecture it knows, at the price of its dispatch and its import.

Its attention is one registered function that leads to the paged kernels, its linear layers are swapped
for stable ones. Imported only when a checkpoint needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from tandem.engine.attention import PagedAttention
from tandem.engine.batch import ForwardBatch, SequenceRows
from tandem.engine.linear import LinearChoice, common_table, swap_linears
from tandem.engine.paged_cache import PagedCache
from tandem.engine.quantization.modules import round_weights, swap_for_bitsandbytes
from tandem.engine.storage import Storage
from tandem.errors import ConfigError

ATTENTION = "tandem_paged"
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class TransformersDecoder:
    """A `PreTrainedModel` wired to the paged attention and to stable linear kernels."""

    implementation = "transformers"

    def __init__(self, model: PreTrainedModel, linears: dict[str, LinearChoice], reason: str) -> None:
        self.reason = reason
        self.eos_token_ids = _eos_token_ids(model)
        self.linears = linears
        self._model = model
        self._table = common_table(self.linears.values())

    @classmethod
    def load(
        cls, path: Path, dtype: torch.dtype, storage: Storage, device: torch.device | str, reason: str
    ) -> TransformersDecoder:
        """Open a checkpoint whose files were checked. Raises `ConfigError`."""
        model = _load_model(path, dtype)
        module: torch.nn.Module = model
        quantized: dict[str, LinearChoice] = {}
        if storage.quantization != "none" and torch.device(device).type == "cpu":
            round_weights(module, storage.quantization)
        elif storage.quantization != "none":
            quantized = swap_for_bitsandbytes(module, storage.quantization)
        module.to(device)
        return cls(model, swap_linears(module, storage.linear) | quantized, reason)

    def batch(self, sequences: Sequence[SequenceRows], cache: PagedCache) -> ForwardBatch:
        """Index one forward over these rows."""
        return ForwardBatch.build(sequences, cache)

    def forward(self, batch: ForwardBatch, cache: PagedCache) -> torch.Tensor:
        batch.clear_new_blocks(cache)
        padding = self._table.padded(batch.num_rows) - batch.num_rows if self._table else 0
        token_ids, positions = batch.token_ids, batch.positions
        if padding:
            token_ids, positions = F.pad(token_ids, (0, padding)), F.pad(positions, (0, padding))
        output = self._model(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=batch.logits_indices,
            forward_batch=batch,
            cache=cache,
        )
        return output.logits[0]  # type: ignore[no-any-return]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, rows, head_dim]
    key: torch.Tensor,  # [1, kv_heads, rows, head_dim]
    value: torch.Tensor,  # [1, kv_heads, rows, head_dim]
    attention_mask: torch.Tensor | None,
    *,
    forward_batch: ForwardBatch,
    cache: PagedCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write the new keys and values, then attend. Rows past the batch's own are padding and come out zero."""
    if kwargs.get("s_aux") is not None:
        raise ConfigError("this model uses attention sinks, which Tandem does not support")
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    rows, layer = forward_batch.num_rows, int(module.layer_idx)  # type: ignore[arg-type]
    kv = torch.cat((k, v), 1)
    cache.write(layer, forward_batch.slot_mapping, kv[:rows])
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    attention = PagedAttention(k.shape[1], scaling, sliding_window, softcap)
    return attention.attend(q, kv, forward_batch, cache, layer)[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Every mask comes from the `ForwardBatch`, so transformers builds none."""


AttentionInterface.register(ATTENTION, paged_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def _load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    _quiet()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        _check_config(config)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be loaded as a decoder-only model: {error}") from error
    module: torch.nn.Module = model
    module.requires_grad_(False).train(False)
    return model


def _quiet() -> None:
    """No progress bars: a worker's standard error is a log."""
    disable: Callable[[], None] = transformers_logging.disable_progress_bar
    disable()


def _check_config(config: PreTrainedConfig) -> None:
    """Refuse what the paged attention cannot compute exactly, by the name of the setting."""
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        raise ConfigError(f"layer types {sorted(other)} are not supported, only {sorted(LAYER_TYPES)}")
    rope = getattr(config, "rope_parameters", None) or {}
    bad = LENGTH_DEPENDENT_ROPE & set(_rope_types(rope))
    if bad:
        raise ConfigError(
            f"rope type {sorted(bad)[0]} makes a token's keys depend on the length of other sequences; "
            "set a fixed rope scaling in config.json"
        )
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_encoder_decoder", False):
        raise ConfigError("only decoder-only models with causal attention are supported")


def _rope_types(parameters: dict[str, Any]) -> list[str]:
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return [str(p.get("rope_type", "default")) for p in (nested or [parameters])]


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """End-of-text ids from the generation config, or else from the model's."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
