"""How blocks are cut into chunks of bounded size."""

from __future__ import annotations

from kvstore.records import ChunkRange


def parts_of(
    num_layers: int, block_bytes: int, chunk_bytes: int, start: int, end: int, chosen: range | None = None
) -> list[ChunkRange]:
    """Blocks [start, end) of all or the chosen layers in parts of at most `chunk_bytes`, or of one layer of a
    block.

    `block_bytes` are those of one block across all layers.
    """
    chosen = range(num_layers) if chosen is None else chosen
    layers = max(1, min(len(chosen), chunk_bytes * num_layers // block_bytes))
    blocks = max(1, chunk_bytes * num_layers // (block_bytes * layers))
    return [
        ChunkRange(
            block_start=first,
            num_blocks=min(blocks, end - first),
            layer_start=layer,
            num_layers=min(layers, chosen.stop - layer),
        )
        for first in range(start, end, blocks)
        for layer in range(chosen.start, chosen.stop, layers)
    ]
