"""KV on its way out of a cache: raw bytes that hold this sequence's tokens and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tandem.engine.paged_cache import PagedCache
from tandem.errors import Internal


def export_kv(
    cache: PagedCache, blocks: Sequence[int], num_tokens: int, layer_start: int, num_layers: int
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
    return memoryview(data.view(torch.uint8).flatten().numpy().data)
