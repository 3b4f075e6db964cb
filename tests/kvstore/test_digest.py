"""Corruption of each kind is found, every time: by the store when it arrives and by the reader."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.assembly import Assembly
from kvstore.key import object_id_of
from kvstore.reader import ReadCheck
from kvstore.records import ChunkRange
from kvstore.wire import decode, encode
from tandem.errors import DataLoss, InvalidRequest
from tests.kvstore.samples import make_chunk, make_header, make_sample

SAMPLE = make_sample()
STORE_EPOCH = 7


def read(frames, header=SAMPLE.header, tenant="tenant-a"):
    check = ReadCheck(header.handle(STORE_EPOCH), tenant)
    chunks = [check.accept(data) for data in frames]
    check.finish()
    return [chunk for chunk in chunks if chunk]


def test_what_was_written_is_read():
    assert [(chunk, bytes(payload)) for chunk, payload in read(SAMPLE.frames)] == SAMPLE.chunks


def test_every_flipped_bit_of_a_payload_is_found():
    chunk, payload = SAMPLE.chunks[0]
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DataLoss):
            Assembly(SAMPLE.header).add(chunk, flipped)


def test_every_flipped_bit_on_the_wire_is_found():
    frames = SAMPLE.frames
    for number, data in enumerate(frames):
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(DataLoss):
                read([*frames[:number], bytes(flipped), *frames[number + 1 :]])


@pytest.mark.parametrize(
    "changes",
    [
        {"object_id": b"\x01" * 16},
        {"epoch": 2},
        {"epoch": 0},
        {"tenant": "tenant-b"},
        {"fingerprint": b"\x01" * 32},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_bytes_of_another_object_are_found(changes):
    """The same bytes in the same place under another name: as chunks, and as a whole object."""
    other = make_sample(replace(SAMPLE.header, **changes))
    assert [payload for _, payload in other.chunks] == [payload for _, payload in SAMPLE.chunks]
    with pytest.raises(DataLoss):
        Assembly(SAMPLE.header).add(*other.chunks[0])
    with pytest.raises(DataLoss):
        read([SAMPLE.frames[0], *other.frames[1:]])
    if changes.keys() <= {"object_id", "epoch", "tenant", "fingerprint"}:
        with pytest.raises(DataLoss):
            read(other.frames)


def test_wrong_frames_are_found():
    header, first, second, seal = SAMPLE.frames
    wrong = {
        "swapped": [header, second, first, seal],
        "missing": [header, first, seal],
        "duplicate": [header, first, first, second, seal],
        "no seal": [header, first, second],
        "no header": [first, second, seal],
        "header twice": [header, header, first, second, seal],
        "after the seal": [header, first, second, seal, second],
        "nothing": [],
        "cut": [header, first, second[:-1], seal],
        "garbage": [header, first, b"garbage", seal],
    }
    for frames in wrong.values():
        with pytest.raises(DataLoss):
            read(frames)


def test_swapped_payloads_are_found():
    header = make_header(num_blocks=4)
    (one, one_payload), (two, two_payload) = make_sample(header).chunks
    with pytest.raises(DataLoss):
        Assembly(header).add(replace(one, digest=two.digest), two_payload)
    with pytest.raises(DataLoss):
        Assembly(header).add(one, two_payload)
    assert (one.length, one_payload) != (two.length, two_payload)


@pytest.mark.parametrize(
    "where",
    [
        ChunkRange(block_start=2, num_blocks=2, layer_start=0, num_layers=2),  # past the last block
        ChunkRange(block_start=0, num_blocks=1, layer_start=1, num_layers=2),  # past the last layer
        ChunkRange(block_start=1, num_blocks=2, layer_start=1, num_layers=1),  # overlaps
    ],
    ids=str,
)
def test_chunks_stay_in_their_place(where):
    assembly = Assembly(SAMPLE.header)
    assembly.add(*SAMPLE.chunks[0])
    payload = bytes(where.num_cells * SAMPLE.header.cell_bytes)
    with pytest.raises(InvalidRequest):
        assembly.add(make_chunk(SAMPLE.header, 1, where, payload), payload)
    assembly.add(*SAMPLE.chunks[1])
    assembly.check(SAMPLE.seal)


def test_layer_groups_in_any_order():
    header = make_header(num_blocks=3, num_layers=5)
    sample = make_sample(header, blocks=1, layers=2)
    ranges = [chunk for chunk, _ in reversed(sample.chunks)]
    assembly = Assembly(header)
    for index, where in enumerate(ranges):
        payload = bytes(where.length)
        assembly.add(make_chunk(header, index, where, payload), payload)
    assert len(assembly.digests) == 9


def test_names_keep_tenants_and_requests_apart():
    names = {
        object_id_of(*pair)
        for pair in [("a", "b"), ("b", "a"), ("", "ab"), ("ab", ""), ("a|b", ""), ("a", "|b")]
    }
    assert len(names) == 6
    assert object_id_of("a", "b") == object_id_of("a", "b")


def test_a_frame_survives_a_copy():
    chunk, payload = SAMPLE.chunks[0]
    assert decode(encode(chunk, memoryview(payload)))[0] == chunk
