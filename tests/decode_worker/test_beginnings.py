"""Pieces from a store go behind the blocks that a sequence shares, and never into those."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.beginnings import StoredBeginnings, place_chunk
from kvstore.records import ChunkRange
from tandem.engine.paged_cache import PagedCache
from tandem.geometry import ModelGeometry
from tandem.prefix_usage import PrefixHit

GEOMETRY = ModelGeometry(
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=16,
    vocab_size=100,
    max_context=64,
    num_parameters=1,
)
PIECE_BLOCKS = 2
NUM_PIECES = 4
BLOCKS = [9, 3, 7, 0, 5, 1, 8, 2]  # of the sequence
CHUNK_BYTES = 2 * 2 * 4 * 2 * 8 * 4  # a block: layers, keys and values, tokens, heads, head_dim, float32


def raw(number: int) -> bytes:
    """Of a piece: every number is its place in the sequence, by block."""
    values = [torch.full((CHUNK_BYTES // 4,), float(1 + PIECE_BLOCKS * number + block)) for block in (0, 1)]
    return torch.cat(values).numpy().tobytes()


class Reader:
    """The stores have the first pieces of every prompt, and `num_sound` of those that are fetched."""

    form = SimpleNamespace(num_blocks=PIECE_BLOCKS, tokens=PIECE_BLOCKS * 4, dtype="float32")

    def __init__(self, num_found: int, num_sound: int) -> None:
        self.num_found, self.num_sound = num_found, num_sound

    async def find(self, tenant, token_ids):
        return list(range(self.num_found))

    async def fetch(self, pieces, wanted):
        num_pieces = min(len(pieces), self.num_sound)
        for number, piece in enumerate(pieces[:num_pieces]):
            where = ChunkRange(block_start=0, num_blocks=PIECE_BLOCKS, layer_start=0, num_layers=2)
            await wanted.place(number, where, memoryview(raw(piece)))
        return num_pieces

    def count(self, num_pieces, *_):
        return PrefixHit(num_pieces * self.form.tokens)


@given(
    num_found=st.integers(0, NUM_PIECES), num_sound=st.integers(0, NUM_PIECES), num_shared=st.integers(0, 8)
)
def test_pieces_fill_what_is_not_shared_up_to_the_first_that_is_missing(num_found, num_sound, num_shared):
    cache = PagedCache(GEOMETRY, 10, 4)
    pool = SimpleNamespace(num_shared=lambda *key: num_shared)
    named = {"key": ("r", 1), "request_id": "r", "epoch": 1, "tenant": ""}
    work = SimpleNamespace(**named, token_ids=[0], num_prompt_tokens=99)
    sequence = SimpleNamespace(work=work, blocks=BLOCKS, num_computed=4 * num_shared, hit=None)
    asyncio.run(StoredBeginnings(Reader(num_found, num_sound), cache, pool).restore(sequence))
    first = num_shared // PIECE_BLOCKS
    placed = max(0, min(num_found - first, num_sound))
    end = PIECE_BLOCKS * (first + placed) if placed else num_shared
    assert sequence.num_computed == 4 * end
    values = cache.read_blocks(BLOCKS).flatten(1)
    for place in range(len(BLOCKS)):
        expected = place + 1.0 if num_shared <= place < end else 0.0
        assert (values[place] == expected).all(), place


@given(num_there=st.integers(-3, 2))
def test_a_chunk_leaves_blocks_alone_that_are_there(num_there):
    cache = PagedCache(GEOMETRY, 4, 4)
    where = ChunkRange(block_start=0, num_blocks=2, layer_start=0, num_layers=2)
    asyncio.run(place_chunk(cache, [2, 1], num_there, where, raw(0), "raw", "float32"))
    values = cache.read_blocks([2, 1]).flatten(1)
    assert [float(row[0]) for row in values] == [0.0 if num_there > 0 else 1.0, 0.0 if num_there > 1 else 2.0]
