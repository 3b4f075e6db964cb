"""What codecs cost is measured, and those that save nothing are no choice."""

from __future__ import annotations

import pytest
import torch

from tandem.engine.codec_costs import measure_codecs
from tandem.engine.kv_codec import vector_bytes
from tandem.engine.paged_cache import PagedCache
from tandem.geometry import ModelGeometry


def cache_of(head_dim: int, dtype: torch.dtype) -> PagedCache:
    geometry = ModelGeometry(
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=head_dim,
        hidden_size=2 * head_dim,
        vocab_size=100,
        max_context=64,
        num_parameters=1000,
    )
    return PagedCache(geometry, 4, 16, dtype)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "expected"),
    [
        (64, torch.float32, ["raw", "fp16", "int8", "int4"]),
        (64, torch.bfloat16, ["raw", "int8", "int4"]),
        (33, torch.float32, ["raw", "fp16", "int8"]),
    ],
)
def test_every_codec_that_saves_bytes_is_measured(head_dim, dtype, expected):
    costs = measure_codecs(cache_of(head_dim, dtype), str(dtype).removeprefix("torch."))
    assert [cost.codec for cost in costs] == expected
    raw = vector_bytes("raw", head_dim, dtype)
    for cost in costs[1:]:
        assert cost.wire_bytes == vector_bytes(cost.codec, head_dim, dtype) / raw < 1
        assert 0 < cost.encode_s < 1e-5
        assert 0 < cost.decode_s < 1e-5
