"""A small Llama in plain PyTorch, its parameters named as Hugging Face names them.

Knows the architecture, dropout for training and a key/value cache for sampling. Knows nothing of
data, optimizers or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of one model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = 4096
    context: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.hidden // self.heads


TARGET = Shape(hidden=256, layers=10, heads=8, kv_heads=2, ffn=704)
DRAFT = Shape(hidden=128, layers=2, heads=4, kv_heads=2, ffn=352)


class Norm(nn.Module):
    """Root-mean-square norm, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class KeyValueCache:
    """Keys and values of a batch of sequences that all have the same length."""

    def __init__(self, shape: Shape, rows: int, length: int, like: Tensor) -> None:
        size = (shape.layers, 2, rows, shape.kv_heads, length, shape.head_dim)
        dtype = torch.bfloat16 if like.is_cuda else torch.float32
        self.data = torch.zeros(size, dtype=dtype, device=like.device)
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new positions of one layer; returns all positions up to them."""
        end = self.length + key.shape[2]
        self.data[layer, 0, :, :, self.length : end] = key
        self.data[layer, 1, :, :, self.length : end] = value
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the halves layout."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer
        inner = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, inner, bias=False)
        self.v_proj = nn.Linear(shape.hidden, inner, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = (
            projection(x).view(rows, length, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, cos, sin).to(value.dtype), rotate(key, cos, sin).to(value.dtype)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        # A cached call is either the whole prompt (causal) or one position (which sees everything).
        out = F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, enable_gqa=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        return projected


class FeedForward(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer; dropout acts on what it adds to the residual stream."""

    def __init__(self, shape: Shape, layer: int, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = Norm(shape.hidden, shape.norm_eps)
        self.mlp = FeedForward(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, cache))
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


class Decoder(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, index, dropout) for index in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.norm_eps)


class Llama(nn.Module):
    """The language model with tied embeddings: token ids in, logits out."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape, dropout)
        self.dropout = nn.Dropout(dropout)
        steps = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        angles = torch.arange(shape.context).float()[:, None] * shape.rope_theta**-steps
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                std = 0.02 if "embed" in name else 0.5 * shape.hidden**-0.5
                nn.init.normal_(parameter, std=std)

    def forward(self, ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits of every position; with a cache, `ids` follow what the cache holds."""
        start = cache.length if cache is not None else 0
        end = start + ids.shape[1]
        cos, sin = self.cos[start:end], self.sin[start:end]
        x = self.dropout(self.model.embed_tokens(ids))
        for layer in self.model.layers:
            x = layer(x, cos, sin, cache)
        if cache is not None:
            cache.length = end
            x = x[:, -1:]
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def parameter_count(model: nn.Module) -> int:
    """The number of parameters, the tied embedding counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
