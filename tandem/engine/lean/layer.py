"""One decoder layer in as few operations as torch allows: fused projections, residuals added in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tandem.engine.attention import PagedAttention
from tandem.engine.lean.norm import Norm
from tandem.engine.lean.rope import Rope
from tandem.engine.linear import Kernel

SERIAL_ELEMENTS = 32_767  # torch splits an elementwise operation over threads from one more on


@dataclass(frozen=True, slots=True)
class Layer:
    """The kernels of a layer. Its methods take at most one tile of rows, in a stable number."""

    attention: PagedAttention
    turned_heads: int  # query and key heads
    head_dim: int
    qkv: Kernel
    output: Kernel
    gate_up: Kernel
    down: Kernel
    input_norm: Norm | None
    head_norm: Norm | None  # over each query and key head
    query_norm: Norm | None  # over all query heads together; then there is a key norm too
    key_norm: Norm | None
    attended_norm: Norm | None
    ffn_norm: Norm | None
    ffn_out_norm: Norm | None
    clip_qkv: float | None

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turned query heads, turned key heads and value heads: `[rows, heads + 2 · kv_heads, dim]`."""
        qkv = self.qkv(x if self.input_norm is None else self.input_norm(x))
        if self.clip_qkv is not None:
            qkv.clamp_(-self.clip_qkv, self.clip_qkv)
        heads = qkv.view(x.shape[0], -1, self.head_dim)
        turned = heads[:, : self.turned_heads]
        if self.head_norm is not None:
            turned.copy_(self.head_norm(turned))
        if self.query_norm is not None and self.key_norm is not None:
            kv_heads = self.attention.kv_heads
            for norm, part in (
                (self.query_norm, turned[:, :-kv_heads]),
                (self.key_norm, turned[:, -kv_heads:]),
            ):
                part.copy_(norm(part.flatten(1)).view(part.shape))
        Rope.turn(turned, cos, sin)
        return heads

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> None:
        """Add to `x` [rows, hidden] what attention [rows, heads · dim] found, then the FFN's answer."""
        out = self.output(attended)
        x.add_(out if self.attended_norm is None else self.attended_norm(out))
        gate_up = self.gate_up(x if self.ffn_norm is None else self.ffn_norm(x))
        out = self.down(_silu_and_mul(gate_up))
        x.add_(out if self.ffn_out_norm is None else self.ffn_out_norm(out))


def _silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) · up`, `[rows, 2 · ffn]` → `[rows, ffn]`.

    The last few numbers of a run go another way through `exp` than those of whole vectors. Row by row the
    runs are the same for any number of rows, unless threads cut through them; so they may not.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    if rows * width <= SERIAL_ELEMENTS:
        return F.silu(gate).mul_(up)
    parts = torch.split(gate, max(SERIAL_ELEMENTS // width, 1))
    return torch.cat([F.silu(part) for part in parts]).mul_(up)
