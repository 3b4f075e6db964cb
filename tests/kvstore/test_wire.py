"""Frames: what goes in comes out, and everything else is BAD_MESSAGE and never another exception."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import wire
from kvstore.records import MAX_OBJECT_BYTES, ChunkHeader, ChunkRange, ObjectHeader, Placed, Seal
from kvstore.wire import MAGIC, MAX_HEADER_BYTES, PREFIX, VERSION, decode, encode, split
from tandem.errors import InvalidRequest
from tandem.pb.kv.v1 import kv_pb2 as pb
from tests.kvstore.samples import make_chunk, make_header, make_sample

SAMPLE = make_sample()
FRAMES = SAMPLE.frames
WHOLE = ChunkRange(block_start=0, num_blocks=1, layer_start=0, num_layers=1)


def refused(data: bytes) -> bool:
    try:
        decode(data)
    except InvalidRequest as error:
        return (error.reason, error.message) == ("BAD_MESSAGE", "malformed request message")
    return False


def message(frame: bytes) -> bytes:
    return pb.PutKvRequest(frame=frame).SerializeToString()


def frame_of(data: bytes) -> bytes:
    return pb.GetKvResponse.FromString(data).frame


def raw(header: bytes, payload: bytes = b"") -> bytes:
    return message(PREFIX.pack(MAGIC, len(header)) + header + payload)


def fields_of(data: bytes) -> dict:
    data = frame_of(data)
    _, length = PREFIX.unpack_from(data)
    return msgpack.unpackb(data[PREFIX.size : PREFIX.size + length])


@pytest.mark.parametrize("data", FRAMES, ids=lambda data: fields_of(data)["kind"])
def test_round_trip(data):
    record, payload = decode(data)
    assert encode(record, payload) == data


@pytest.mark.parametrize("length", [0, 1, 100, 127, 128, 16_383, 16_384, 1 << 20, 4 << 20])
def test_a_message_is_what_protobuf_makes_of_its_frame(length):
    header = make_header(num_blocks=1, num_layers=1)
    record = SAMPLE.seal if length == 0 else make_chunk(header, 0, WHOLE, bytes(length))
    data = encode(record, bytes(length))
    assert message(frame_of(data)) == data
    assert decode(data) == (record, bytes(length))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x0a\x80",
        b"\x0a" + b"\xff" * 12,
        b"\x0a\x00",
        b"\x12\x00",
        b"\x0a\x81\x00x",
        FRAMES[0] * 2,
    ],
)
def test_other_protobuf_is_refused(data):
    assert refused(data)


def test_payload_is_a_view():
    record, payload = decode(FRAMES[1])
    assert isinstance(record, ChunkHeader)
    assert payload.obj is FRAMES[1]
    assert payload == SAMPLE.chunks[0][1]


@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, (1 << 64) - 1),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=128),
    st.integers(1, 300),
    st.integers(1, 80),
)
def test_any_header_round_trips(object_id, epoch, tenant, num_blocks, num_layers):
    header = make_header(object_id, epoch=epoch, tenant=tenant, num_blocks=num_blocks, num_layers=num_layers)
    assert decode(encode(header))[0] == header


@pytest.mark.parametrize("data", FRAMES)
def test_every_truncation_is_refused(data):
    assert all(refused(data[:length]) for length in range(len(data)))


@pytest.mark.parametrize("data", FRAMES)
def test_trailing_bytes_are_refused(data):
    assert refused(data + b"\x00")


@pytest.mark.parametrize("data", FRAMES)
def test_every_bit_flip_is_refused_or_another_record(data):
    record, payload = decode(data)
    for position in range(8 * (len(data) - len(payload))):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        if not refused(bytes(flipped)):
            assert decode(bytes(flipped))[0] != record


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    assert refused(data)
    assert refused(message(data))
    assert refused(raw(data))


@given(st.sampled_from(FRAMES), st.integers(0, (1 << 32) - 1))
def test_lying_header_length_is_refused(data, length):
    frame = frame_of(data)
    _, true_length = PREFIX.unpack_from(frame)
    assert length == true_length or refused(message(frame[:4] + struct.pack("<I", length) + frame[8:]))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.binary(max_size=80),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=3),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8)),
)


@given(st.sampled_from(FRAMES), st.data(), VALUES)
def test_any_value_in_any_field_is_refused_or_well_formed(data, choose, value):
    fields = fields_of(data)
    name = choose.draw(st.sampled_from(sorted(fields)))
    fields[name] = value
    _, payload = decode(data)
    changed = raw(msgpack.packb(fields), bytes(payload))
    if not refused(changed):
        assert encode(*decode(changed)) == changed


HOSTILE = {
    "array of 4 Gi": b"\xdd\xff\xff\xff\xff",
    "map of 4 Gi": b"\xdf\xff\xff\xff\xff",
    "string of 4 Gi": b"\xdb\xff\xff\xff\xff",
    "binary of 4 Gi": b"\xc6\xff\xff\xff\xff",
    "extension of 4 Gi": b"\xc9\xff\xff\xff\xff\x01",
    "timestamp": b"\xd7\xff" + bytes(8),
    "empty extension": b"\xc7\x00\x01",
    "nested arrays": b"\x91" * 1000 + b"\xc0",
    "nested maps": b"\x81\xa1a" * 330 + b"\xc0",
    "many empty maps": b"\x80" * MAX_HEADER_BYTES,
    "not a map": b"\xa1a",
    "empty map": b"\x80",
    "nil": b"\xc0",
    "invalid UTF-8 key": b"\x81\xa1\xff\x01",
    "reserved byte": b"\xc1",
    "number as a key": b"\x81\x01\x01",
    "nil as a key": b"\x81\xc0\x01",
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_msgpack_is_refused(header):
    assert refused(raw(header))


def test_header_over_the_limit_is_refused():
    assert refused(raw(b"\xda\x04\x00" + b"a" * 1024))


def test_too_deep_and_too_long_for_the_parser_is_refused_before_it():
    assert refused(raw(b"\x91" * 100_000))


@pytest.mark.parametrize("data", FRAMES)
def test_shape_of_the_map_is_fixed(data):
    fields = fields_of(data)
    payload = bytes(decode(data)[1])
    packed = msgpack.packb(fields)
    variants = [
        msgpack.packb(fields | {"extra": 1}),  # unknown field
        msgpack.packb(dict(reversed(fields.items()))),  # version not first
        msgpack.packb(fields | {"v": VERSION + 1}),
        msgpack.packb(fields | {"v": VERSION - 1}),
        msgpack.packb(fields | {"v": True}),
        msgpack.packb(fields | {"kind": "pickle"}),
        msgpack.packb({name.encode(): value for name, value in fields.items()}),  # binary keys
        bytes([packed[0] + 1]) + packed[1:] + msgpack.packb("v") + msgpack.packb(VERSION),  # duplicate key
        packed.replace(b"\xa1v\x02", b"\xa1v\xcc\x02", 1),  # a longer spelling of 2
        packed + b"\xc0",
        *(msgpack.packb({k: v for k, v in fields.items() if k != name}) for name in fields),
    ]
    assert all(refused(raw(variant, payload)) for variant in variants)


BAD_HEADERS = [
    {"object_id": bytes(15)},
    {"fingerprint": bytes(31)},
    {"epoch": -1},
    {"codec": "zip"},
    {"layout": "other"},
    {"dtype": "int8"},
    {"num_tokens": 0},
    {"num_tokens": 13},
    {"total_bytes": 0},
    {"total_bytes": 3 * 2 * 64 + 1},
    {"num_layers": 0},
    {"block_size": 0},
    {"tenant": "t" * 129},
]


@pytest.mark.parametrize("changes", BAD_HEADERS, ids=str)
def test_headers_that_contradict_themselves_are_refused(changes):
    assert refused(raw(msgpack.packb(fields_of(FRAMES[0]) | changes)))
    with pytest.raises(InvalidRequest):
        make_header(**changes)


def test_payload_only_on_chunks():
    assert refused(FRAMES[0] + b"x")
    assert refused(FRAMES[-1] + b"x")


def test_expect_refuses_another_kind():
    assert wire.expect(ObjectHeader, SAMPLE.header) is SAMPLE.header
    with pytest.raises(InvalidRequest):
        wire.expect(Seal, SAMPLE.header)


def test_messages_behind_each_other_are_told_apart():
    messages = FRAMES[1:-1]
    assert list(split(memoryview(b"".join(messages)))) == messages
    assert list(split(memoryview(b""))) == []


@given(data=st.binary(max_size=400), keep=st.integers(0, 400))
def test_whatever_lies_in_a_file_is_messages_or_refused(data, keep):
    whole = b"".join(FRAMES[1:-1])
    lying = whole[:keep] + data
    try:
        found = [decode(message) for message in split(memoryview(lying))]
    except InvalidRequest:
        return
    assert b"".join(encode(*each) for each in found) == lying


@given(st.integers(1, MAX_OBJECT_BYTES))
def test_a_note_crosses_and_holds_no_payload(end):
    data = encode(Placed(end=end))
    assert decode(data) == (Placed(end=end), b"")
    assert refused(data + b"x")


@pytest.mark.parametrize("end", [0, -1, MAX_OBJECT_BYTES + 1])
def test_a_note_of_nothing_is_refused(end):
    with pytest.raises(InvalidRequest):
        Placed(end=end)
