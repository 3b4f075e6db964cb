"""Readers that have an object's first blocks get the others, checked as ever; nothing else is sent."""

from __future__ import annotations

import random
from contextlib import aclosing

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.key import KvHandle
from kvstore.reader import ReadCheck
from kvstore.records import ChunkHeader
from kvstore.wire import decode, reaches
from tandem.errors import DataLoss
from tests.kvstore.backends import SCHEMES, medium
from tests.kvstore.samples import make_header, make_sample
from tests.kvstore.test_service import serving

NUM_BLOCKS = 7


def read(handle: KvHandle, messages, first_block: int) -> list[ChunkHeader]:
    check = ReadCheck(handle, first_block=first_block)
    chunks = [found[0] for message in messages if (found := check.accept(message)) is not None]
    check.finish()
    return chunks


@given(
    first_block=st.integers(0, NUM_BLOCKS),
    blocks=st.integers(1, 4),
    layers=st.integers(1, 3),
    seed=st.integers(),
)
@example(first_block=NUM_BLOCKS, blocks=1, layers=1, seed=1618045)  # is_prefix of a header without chunks
def test_every_cell_behind_comes_once_and_any_damage_is_found(first_block, blocks, layers, seed):
    rng = random.Random(seed)
    header = make_header(num_blocks=NUM_BLOCKS, num_layers=3)
    sample = make_sample(header, blocks=blocks, layers=layers)
    messages = [message for message in sample.frames if reaches(message, first_block)]
    chunks = read(header.handle(5), messages, first_block)
    cells = [
        (block, layer)
        for chunk in chunks
        for block in range(chunk.block_start, chunk.block_start + chunk.num_blocks)
        for layer in range(chunk.layer_start, chunk.layer_start + chunk.num_layers)
        if block >= first_block
    ]
    assert sorted(cells) == [(block, layer) for block in range(first_block, NUM_BLOCKS) for layer in range(3)]
    assert all(chunk.block_start + chunk.num_blocks > first_block for chunk in chunks if first_block)

    place = rng.randrange(len(messages))
    damaged = bytearray(messages[place])
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    is_seal = place == len(messages) - 1 and first_block > 0  # what it says of all chunks cannot be checked
    is_alone = place == 0 and first_block == NUM_BLOCKS  # no chunk binds it, and none is read with it
    if not (is_seal or is_alone):
        with pytest.raises(DataLoss):
            read(header.handle(5), [*messages[:place], bytes(damaged), *messages[place + 1 :]], first_block)
    for wrong in (messages[:place] + messages[place + 1 :], messages[:place] + messages[place:][::-1]):
        if wrong != messages:
            with pytest.raises(DataLoss):
                read(header.handle(5), wrong, first_block)


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_every_store_leaves_out_what_the_reader_has(scheme, follow, tmp_path):
    sample = make_sample(make_header(num_blocks=NUM_BLOCKS), blocks=2)
    with medium(scheme, tmp_path) as place:
        async with serving(backend=place.open()) as service, service.client() as client:
            async with client.put(sample.header) as writer:
                for chunk, payload in sample.chunks:
                    await writer.write(chunk, payload)
                handle = await writer.seal()
            for first_block in range(NUM_BLOCKS + 1):
                reading = client.get(handle, "r", follow=follow, first_block=first_block)
                async with aclosing(reading) as chunks:
                    found = [(chunk, bytes(payload)) async for chunk, payload in chunks]
                wanted = [c for c in sample.chunks if c[0].block_start + c[0].num_blocks > first_block]
                assert found == wanted
            await client.release(handle)


def test_what_is_no_chunk_always_comes():
    sample = make_sample(make_header(num_blocks=3))
    first, *_, last = sample.frames
    assert reaches(first, 3)
    assert reaches(last, 3)
    assert decode(first)[0] == sample.header
