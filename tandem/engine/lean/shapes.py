"""The tensors a checkpoint of the Llama family must hold, from its configuration."""

from __future__ import annotations

from collections.abc import Iterator

from tandem.engine.lean.config import LeanConfig

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def tensor_shapes(config: LeanConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint."""
    geometry = config.geometry
    hidden = geometry.hidden_size
    yield EMBEDDING, (geometry.vocab_size, hidden)
    if not config.tied:
        yield HEAD, (geometry.vocab_size, hidden)
    if not config.architecture.plain_norm:
        yield "model.norm.weight", (hidden,)
    for index in range(geometry.num_layers):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{index}.{name}", shape


def _layer_shapes(config: LeanConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    geometry, known = config.geometry, config.architecture
    hidden, ffn, dim = geometry.hidden_size, config.intermediate_size, geometry.head_dim
    query, key = geometry.num_heads * dim, geometry.num_kv_heads * dim
    for name, rows, columns, biased in (
        ("self_attn.q_proj", query, hidden, config.qkv_bias),
        ("self_attn.k_proj", key, hidden, config.qkv_bias),
        ("self_attn.v_proj", key, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, query, config.output_bias),
        ("mlp.gate_proj", ffn, hidden, config.mlp_bias),
        ("mlp.up_proj", ffn, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, ffn, config.mlp_bias),
    ):
        yield f"{name}.weight", (rows, columns)
        if biased:
            yield f"{name}.bias", (rows,)
    if not known.plain_norm:
        yield "post_attention_layernorm.weight", (hidden,)
        other = "post_feedforward_layernorm" if known.norm_after else "input_layernorm"
        yield f"{other}.weight", (hidden,)
    if known.qk_norm:
        alike = known.qk_norm == "head"
        yield "self_attn.q_norm.weight", (dim if alike else query,)
        yield "self_attn.k_norm.weight", (dim if alike else key,)
