"""The Llama family without transformers: tensors from safetensors, a step of a few torch calls per layer.

Rows are independent by construction. Linear kernels run only at row counts where each row keeps its bits
(see `tandem.engine.linear`), more rows than a tile go tile by tile, and what lies between works on rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tandem.engine.attention import PagedAttention
from tandem.engine.batch import ForwardBatch, SequenceRows
from tandem.engine.checkpoint import eos_token_ids
from tandem.engine.lean.config import LeanConfig
from tandem.engine.lean.layer import Layer
from tandem.engine.lean.norm import Norm, PlainNorm, RmsNorm
from tandem.engine.lean.rope import Rope
from tandem.engine.lean.shapes import EMBEDDING, HEAD, tensor_shapes
from tandem.engine.lean.weights import Weights
from tandem.engine.linear import TILE, Kernel, LinearChoice, Probes, RowTable, choose, common_table
from tandem.engine.paged_cache import PagedCache
from tandem.engine.quantization.formats import quantize
from tandem.engine.storage import Storage


class LeanDecoder:
    """A loaded model. Holds no state of a forward, so several caches may share it."""

    implementation = "lean"

    def __init__(self, loader: _Loader, eos: frozenset[int], reason: str) -> None:
        geometry = loader.config.geometry
        self.reason = reason
        self.eos_token_ids = eos
        self.linears = loader.linears
        self._embedding = loader.weights.get(EMBEDDING).clone()  # [vocab, hidden] float32
        self._layers = [loader.layer(i) for i in range(geometry.num_layers)]
        self._norm = loader.norm("model.norm")
        self._head = loader.linear(
            "lm_head", [EMBEDDING.removesuffix(".weight")] if loader.config.tied else None
        )
        self._rope = Rope(loader.config.rope, geometry.num_heads, geometry.num_kv_heads, geometry.head_dim)
        self._num_heads = geometry.num_heads
        self._table = common_table(self.linears.values()) or RowTable()

    @classmethod
    def load(
        cls, path: Path, config: LeanConfig, raw: dict[str, Any], storage: Storage, reason: str
    ) -> LeanDecoder:
        """Open a checkpoint whose config was parsed. Raises `ConfigError` for weights that do not fit it."""
        with Weights(path) as weights:
            weights.check(dict(tensor_shapes(config)), frozenset({HEAD}) if config.tied else frozenset())
            eos = eos_token_ids(path, raw, config.architecture.eos_token_id)
            return cls(_Loader(config, weights, storage), eos, reason)

    def batch(self, sequences: Sequence[SequenceRows], cache: PagedCache) -> ForwardBatch:
        """Index one forward over these rows."""
        return ForwardBatch.build(sequences, cache)

    def forward(self, batch: ForwardBatch, cache: PagedCache) -> torch.Tensor:
        """Fill the cache and return `[num_logits_rows, vocab]` float32."""
        batch.clear_new_blocks(cache)
        rows, token_ids, positions = batch.num_rows, batch.token_ids[0], batch.positions[0]
        padding = self._table.padded(rows) - rows
        if padding:
            token_ids, positions = F.pad(token_ids, (0, padding)), F.pad(positions, (0, padding))
        x = self._embedding.index_select(0, token_ids)  # [padded rows, hidden]
        cos, sin = self._rope.angles(positions, int(batch.context_lens.max()))
        run = self._run if x.shape[0] <= TILE else self._run_tiles
        run(x, cos, sin, batch, cache)
        return self._head(self._norm(x.index_select(0, batch.logits_indices)))

    def _run(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: ForwardBatch, cache: PagedCache
    ) -> None:
        """All layers over one tile of rows; `x` [padded rows, hidden] changes in place."""
        for index, layer in enumerate(self._layers):
            layer.finish(x, self._attend(index, layer.project(x, cos, sin), batch, cache))

    def _run_tiles(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: ForwardBatch, cache: PagedCache
    ) -> None:
        """The same over many rows: attention sees all of them, the rest goes tile by tile."""
        tiles = [tuple(part) for part in zip(*(torch.split(t, TILE) for t in (x, cos, sin)), strict=True)]
        for index, layer in enumerate(self._layers):
            heads = torch.cat([layer.project(*tile) for tile in tiles])
            attended = torch.split(self._attend(index, heads, batch, cache), TILE)
            for (rows, *_), part in zip(tiles, attended, strict=True):
                layer.finish(rows, part)

    def _attend(
        self, index: int, heads: torch.Tensor, batch: ForwardBatch, cache: PagedCache
    ) -> torch.Tensor:
        """`[padded rows, heads + 2 · kv_heads, dim]` → `[padded rows, heads · dim]`."""
        attention, rows = self._layers[index].attention, batch.num_rows
        q, kv = heads[:, : self._num_heads], heads[:, self._num_heads :]
        cache.write(index, batch.slot_mapping, kv if len(kv) == rows else kv[:rows])
        return attention.attend(q, kv, batch, cache, index).reshape(len(heads), -1)


class _Loader:
    """Builds kernels and norms out of named tensors."""

    def __init__(self, config: LeanConfig, weights: Weights, storage: Storage) -> None:
        self.config = config
        self.weights = weights
        self.linears: dict[str, LinearChoice] = {}
        self._storage = storage
        self._probes: Probes = {}
        self._names = {name for name, _ in tensor_shapes(config)}

    def layer(self, index: int) -> Layer:
        config, at = self.config, f"model.layers.{index}"
        geometry, after = config.geometry, config.architecture.norm_after
        attention, mlp, qk_norm = f"{at}.self_attn", f"{at}.mlp", config.architecture.qk_norm
        return Layer(
            attention=PagedAttention(geometry.num_kv_heads, window=config.windows[index]),
            turned_heads=geometry.num_heads + geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            qkv=self.linear(f"{attention}.qkv_proj", [f"{attention}.{x}_proj" for x in "qkv"]),
            output=self.linear(f"{attention}.o_proj"),
            gate_up=self.linear(f"{mlp}.gate_up_proj", [f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            down=self.linear(f"{mlp}.down_proj"),
            input_norm=None if after else self.norm(f"{at}.input_layernorm"),
            head_norm=self._head_norm(attention) if qk_norm == "head" else None,
            query_norm=self.norm(f"{attention}.q_norm") if qk_norm == "all" else None,
            key_norm=self.norm(f"{attention}.k_norm") if qk_norm == "all" else None,
            attended_norm=self.norm(f"{at}.post_attention_layernorm") if after else None,
            ffn_norm=None if after else self.norm(f"{at}.post_attention_layernorm"),
            ffn_out_norm=self.norm(f"{at}.post_feedforward_layernorm") if after else None,
            clip_qkv=config.clip_qkv,
        )

    def linear(self, name: str, parts: list[str] | None = None) -> Kernel:
        """The best kernel for the weights of `parts` on top of each other; `name` is what the report says."""
        parts = parts or [name]
        weight = torch.cat([self.weights.get(f"{part}.weight") for part in parts])
        if self._storage.quantization != "none" and name != "lm_head" and not self._storage.is_given:
            quantized = quantize(weight, self._storage.quantization)
            weight = weight if quantized is None else quantized.dequantize()
        biased = f"{parts[0]}.bias" in self._names
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=biased, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        if biased:
            bias = torch.cat([self.weights.get(f"{part}.bias") for part in parts])
            linear.bias = torch.nn.Parameter(bias, requires_grad=False)
        chosen = choose(linear, self._storage.linear, self._probes)
        if chosen is None:
            self.linears[name] = LinearChoice("torch", "no stable kernel here: rows may depend on the batch")
            return linear
        self.linears[name] = chosen.choice
        return chosen if name == "lm_head" else chosen.kernel

    def norm(self, name: str) -> Norm:
        if self.config.architecture.plain_norm:
            return PlainNorm(self.config.norm_eps)
        return RmsNorm(self.weights.get(f"{name}.weight"), self.config.norm_eps)

    def _head_norm(self, attention: str) -> Norm:
        """The query's weights for each query head, then the key's for each key head."""
        geometry = self.config.geometry
        query, key = (self.weights.get(f"{attention}.{x}_norm.weight") for x in "qk")
        weight = [query.expand(geometry.num_heads, -1), key.expand(geometry.num_kv_heads, -1)]
        return RmsNorm(torch.cat(weight), self.config.norm_eps)
