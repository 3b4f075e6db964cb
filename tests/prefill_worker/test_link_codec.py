"""The codec that brings KV over soonest, by what the link was measured to take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.link_codec import LEAST_BYTES, RECENT, LinkCodec
from tandem.engine.codec_costs import CodecCost

RAW = CodecCost("raw", 1.0, 0.0, 0.0)
INT8 = CodecCost("int8", 0.27, 2e-9, 1e-9)
INT4 = CodecCost("int4", 0.14, 8e-9, 4e-9)
COSTS = [RAW, INT8, INT4]
MIB = 1 << 20


def choice_at(bytes_per_s: float) -> str:
    link = LinkCodec(COSTS)
    link.note(MIB, MIB / bytes_per_s)
    return link.choose()


def test_a_fast_link_takes_raw_and_a_slow_one_less_bytes():
    assert [choice_at(rate) for rate in (8e9, 1e8, 1e6)] == ["raw", "int8", "int4"]


@given(st.floats(1e4, 1e11))
def test_no_other_codec_would_be_sooner(bytes_per_s):
    chosen = choice_at(bytes_per_s)
    times = {cost.codec: cost.encode_s + cost.wire_bytes / bytes_per_s + cost.decode_s for cost in COSTS}
    assert times[chosen] <= min(times.values()) * (1 + 1e-9)


def test_before_anything_was_measured_kv_leaves_raw():
    link = LinkCodec(COSTS)
    link.note(LEAST_BYTES - 1, 10.0)
    link.note(MIB, 0.0)
    assert link.bytes_per_s is None
    assert link.choose() == "raw"


def test_the_choice_follows_the_link_both_ways():
    link = LinkCodec(COSTS)
    for bytes_per_s, expected in ((8e9, "raw"), (1e6, "int4"), (8e9, "raw")):
        for _ in range(RECENT):
            link.note(MIB, MIB / bytes_per_s)
        assert link.bytes_per_s == pytest.approx(bytes_per_s)
        assert link.choose() == expected


def test_a_configured_codec_is_what_it_is():
    link = LinkCodec.of("int8", cache=None, dtype="float32")
    link.note(MIB, 1e-6)
    assert link.choose() == "int8"
