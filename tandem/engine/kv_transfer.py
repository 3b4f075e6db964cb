"""KV on its way out of a cache and into another: bytes that hold one sequence's tokens and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from tandem.engine.kv_codec import decode, encode, vector_bytes
from tandem.engine.paged_cache import PagedCache, all_finite, tensor_over
from tandem.errors import Internal

Buffer = bytes | bytearray | memoryview


def block_bytes(cache: PagedCache, codec: str, dtype: str | None = None) -> int:
    """Bytes of one block of all layers on the wire; raw in `dtype`, the cache's own by default."""
    geometry = cache.geometry
    vectors = geometry.num_layers * 2 * cache.block_size * geometry.num_kv_heads
    return vectors * vector_bytes(codec, geometry.head_dim, _dtype_of(cache, dtype))


def export_kv(
    cache: PagedCache,
    blocks: Sequence[int],
    num_tokens: int,
    layer_start: int,
    num_layers: int,
    codec: str = "raw",
    dtype: str | None = None,
) -> memoryview:
    """Bytes of `[len(blocks), num_layers, 2, block_size, kv_heads, head_dim]`; raw in `dtype`, the cache's
    own by default.

    Slots past `num_tokens` may hold another request's KV and are zeroed. Raises NUMERICS if a value is
    not finite, or not in that dtype: such KV never leaves the worker.
    """
    used_in_last = num_tokens - (len(blocks) - 1) * cache.block_size
    moved = None
    if codec == "raw" and _dtype_of(cache, dtype) == cache.dtype:
        moved = cache.export_blocks(blocks, used_in_last, layer_start, num_layers)
    if moved is not None:
        exported, is_finite = moved
        return exported if is_finite else _refuse()
    data = cache.read_blocks(blocks, layer_start, num_layers)
    data[-1, :, :, used_in_last:] = 0
    if codec == "raw":
        data = data.to(_dtype_of(cache, dtype))
    return memoryview(encode(data, codec).flatten().numpy().data) if all_finite(data) else _refuse()


def import_kv(
    cache: PagedCache,
    blocks: Sequence[int],
    data: Buffer,
    layer_start: int,
    num_layers: int,
    codec: str = "raw",
    dtype: str | None = None,
) -> None:
    """Fill blocks from the bytes of `export_kv`, which may be raw in another `dtype` than the cache's.
    ValueError if the size does not match."""
    if codec == "raw":
        cache.write_blocks(blocks, data, layer_start, num_layers, _dtype_of(cache, dtype))
        return
    geometry = cache.geometry
    width = vector_bytes(codec, geometry.head_dim, cache.dtype)
    shape = (len(blocks), num_layers, 2, cache.block_size, geometry.num_kv_heads, width)
    values = decode(tensor_over(data, torch.uint8, shape), codec, geometry.head_dim, cache.dtype)
    raw = values.contiguous().view(torch.uint8).flatten().numpy().data
    cache.write_blocks(blocks, raw, layer_start, num_layers)


def _dtype_of(cache: PagedCache, name: str | None) -> torch.dtype:
    found: torch.dtype = getattr(torch, name) if name else cache.dtype
    return found


def _refuse() -> NoReturn:
    raise Internal.numerics()
