"""KV on its way out of a cache and into another: bytes that hold one sequence's tokens and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tandem.engine.kv_codec import decode, encode, vector_bytes
from tandem.engine.paged_cache import PagedCache, tensor_over
from tandem.errors import Internal

Buffer = bytes | bytearray | memoryview


def block_bytes(cache: PagedCache, codec: str) -> int:
    """Bytes of one block of all layers on the wire."""
    geometry = cache.geometry
    vectors = geometry.num_layers * 2 * cache.block_size * geometry.num_kv_heads
    return vectors * vector_bytes(codec, geometry.head_dim, cache.dtype)


def export_kv(
    cache: PagedCache,
    blocks: Sequence[int],
    num_tokens: int,
    layer_start: int,
    num_layers: int,
    codec: str = "raw",
) -> memoryview:
    """Bytes of `[len(blocks), num_layers, 2, block_size, kv_heads, head_dim]`.

    Slots past `num_tokens` may hold another request's KV and are zeroed. Raises NUMERICS if a value is
    not finite: such KV never leaves the worker.
    """
    data = cache.read_blocks(blocks, layer_start, num_layers)
    used_in_last = num_tokens - (len(blocks) - 1) * cache.block_size
    data[-1, :, :, used_in_last:] = 0
    if not bool(data.isfinite().all()):
        raise Internal.numerics()
    return memoryview(encode(data, codec).flatten().numpy().data)


def import_kv(
    cache: PagedCache,
    blocks: Sequence[int],
    data: Buffer,
    layer_start: int,
    num_layers: int,
    codec: str = "raw",
) -> None:
    """Fill blocks from the bytes of `export_kv`. ValueError if the size does not match."""
    if codec == "raw":
        cache.write_blocks(blocks, data, layer_start, num_layers)
        return
    geometry = cache.geometry
    width = vector_bytes(codec, geometry.head_dim, cache.dtype)
    shape = (len(blocks), num_layers, 2, cache.block_size, geometry.num_kv_heads, width)
    values = decode(tensor_over(data, torch.uint8, shape), codec, geometry.head_dim, cache.dtype)
    raw = values.contiguous().view(torch.uint8).flatten().numpy().data
    cache.write_blocks(blocks, raw, layer_start, num_layers)
