"""KV on the wire in fewer bytes: halves, or integers of eight or four bits with their scales inline.

    raw    the cache's own numbers; the only codec that changes no token
    fp16   halves
    int8   -127 … 127 per number, one bfloat16 scale per group of 32 numbers of a head (8.5 bits)
    int4   -7 … 7, likewise (4.5 bits)

A group of keys or values of one token and head is `[codes, scale]` in bytes, so any part of an object can be
read by itself. What scales cannot hold is not finite, and the sender refuses that before it gets here.
"""

from __future__ import annotations

import torch

GROUP = 32
INT8_MOST, INT4_MOST = 127, 7
SCALE_BYTES = 2


def vector_bytes(codec: str, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one vector of `head_dim` numbers. ValueError where int4 has an odd number to pack."""
    if codec == "raw":
        return head_dim * dtype.itemsize
    if codec == "fp16":
        return 2 * head_dim
    groups = head_dim // _group(head_dim)
    if codec == "int4" and head_dim % 2:
        raise ValueError(f"codec int4 needs an even head_dim, not {head_dim}")
    return head_dim // (2 if codec == "int4" else 1) + groups * SCALE_BYTES


def encode(values: torch.Tensor, codec: str) -> torch.Tensor:
    """`values` [..., head_dim] → uint8 [..., vector_bytes], contiguous."""
    if codec == "raw":
        return values.contiguous().view(torch.uint8)
    if codec == "fp16":
        return values.clamp(*_half_range()).half().view(torch.uint8)
    grouped = _by_group(values.float(), values.shape[-1] // _group(values.shape[-1]))
    most = INT8_MOST if codec == "int8" else INT4_MOST
    scales = (grouped.abs().amax(-1, keepdim=True) / most).bfloat16()
    steps = torch.where(scales > 0, scales.float(), 1.0)
    codes = (grouped / steps).round_().clamp_(-most, most).to(torch.int8)
    packed = codes.view(torch.uint8) if codec == "int8" else _pack(codes)
    return torch.cat((packed, scales.view(torch.uint8)), -1).flatten(-2)


def decode(data: torch.Tensor, codec: str, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """`data` uint8 [..., vector_bytes] → `[..., head_dim]` of `dtype`."""
    if codec == "raw":
        return data.view(dtype)
    if codec == "fp16":
        return data.view(torch.float16).to(dtype)
    parts = _by_group(data, head_dim // _group(head_dim))
    packed, scales = parts[..., :-SCALE_BYTES], parts[..., -SCALE_BYTES:]
    codes = packed.view(torch.int8) if codec == "int8" else _unpack(packed)
    steps = scales.contiguous().view(torch.bfloat16).float()
    values: torch.Tensor = (codes.float() * steps).flatten(-2).to(dtype)
    return values


def _group(head_dim: int) -> int:
    return GROUP if head_dim % GROUP == 0 else head_dim


def _by_group(values: torch.Tensor, groups: int) -> torch.Tensor:
    """`[..., n]` → `[..., groups, n / groups]`."""
    return values.reshape(*values.shape[:-1], groups, -1)


def _half_range() -> tuple[float, float]:
    limits = torch.finfo(torch.float16)
    return limits.min, limits.max


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes to a byte, the first in the low half."""
    shifted = (codes + 8).view(torch.uint8)
    return shifted[..., 0::2] | shifted[..., 1::2] << 4


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    pairs = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return pairs.view(torch.int8) - 8
