"""Blocks that own kernels move are those that torch moves, bit by bit, in every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine import paged_cache
from tandem.engine.kv_transfer import export_kv, import_kv
from tandem.engine.native import build
from tandem.engine.native.transfer import BlockMover
from tandem.engine.paged_cache import PagedCache
from tandem.errors import Internal
from tandem.geometry import ModelGeometry

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_BLOCKS = 7


def make_cache(kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32, *, seed=0) -> PagedCache:
    """Full of numbers."""
    sizes = {"hidden_size": 1, "vocab_size": 1, "max_context": 1, "num_parameters": 0}
    geometry = ModelGeometry(
        num_layers=3, num_heads=kv_heads, num_kv_heads=kv_heads, head_dim=head_dim, **sizes
    )
    cache = PagedCache(geometry, NUM_BLOCKS, block_size, dtype)
    cache._data[:, :, :, :NUM_BLOCKS] = torch.randn(
        cache._data[:, :, :, :NUM_BLOCKS].shape, generator=torch.Generator().manual_seed(seed)
    )
    return cache


def read(cache, blocks, layers, num_used):
    """As torch reads them: bytes."""
    data = cache.read_blocks(blocks, layers.start, len(layers))
    data[-1, :, :, num_used:] = 0
    return data.view(torch.uint8).numpy().tobytes()


def check(isa, cache, blocks, layers, num_used):
    mover, other = BlockMover(isa, cache._data), make_cache(*shape_of(cache), seed=1)
    moved, is_finite = mover.export(blocks, layers, num_used)
    assert is_finite
    assert bytes(moved) == read(cache, blocks, layers, num_used)
    expected = other._data.clone()
    at = torch.tensor(blocks)
    expected[layers.start : layers.stop, :, :, at] = cache._data[layers.start : layers.stop, :, :, at]
    expected[layers.start : layers.stop, :, :, blocks[-1], num_used:] = 0
    BlockMover(isa, other._data).place(blocks, layers, moved)
    assert torch.equal(other._data, expected), "those blocks and no others"


def shape_of(cache):
    geometry = cache.geometry
    return geometry.num_kv_heads, geometry.head_dim, cache.block_size, cache.dtype


shapes = st.tuples(
    st.sampled_from([1, 2, 3, 12]),
    st.sampled_from([1, 6, 8, 64]),
    st.sampled_from([1, 4, 16]),
    st.sampled_from(DTYPES),
)


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    blocks=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, unique=True),
    start=st.integers(0, 2),
    more=st.integers(1, 3),
    used=st.integers(1, 16),
)
def test_any_blocks_of_any_layers_arrive_as_they_left(shape, blocks, start, more, used):
    cache = make_cache(*shape)
    layers = range(start, min(3, start + more))
    check(build.instruction_set(), cache, blocks, layers, min(used, cache.block_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_instruction_sets_move_the_same_bytes(other_isa, dtype):
    check(other_isa, make_cache(3, 24, 16, dtype), [5, 0, 2], range(1, 3), 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["kernels", "torch"])
def test_what_is_not_finite_stays_unless_it_is_nobodys(monkeypatch, way, dtype, bad):
    if way == "torch":
        monkeypatch.setattr(paged_cache, "kernels_for", lambda device: None)
    for number in range(4 * 8):
        cache = make_cache(dtype=dtype)
        cache._data[1, 1, 1, 5, number // 8, number % 8] = bad
        if number // 8 < 2:
            with pytest.raises(Internal, match="finite"):
                export_kv(cache, [0, 5], 6, 0, 3)
        else:
            assert export_kv(cache, [0, 5], 6, 0, 3), "slots past the prompt may hold anything"
        assert export_kv(cache, [0, 5], 8, 0, 1), "another layer"
        with pytest.raises(Internal, match="finite"):
            export_kv(cache, [5, 0], 8, 1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_are_finite(dtype):
    cache = make_cache(dtype=dtype)
    cache._data[1, 1, 1, 5] = torch.finfo(dtype).max
    cache._data[1, 0, 1, 5] = torch.finfo(dtype).min
    assert export_kv(cache, [5], 4, 0, 3)


@pytest.mark.parametrize("way", ["kernels", "torch"])
def test_bytes_that_do_not_fit_are_refused_and_nothing_is_written(monkeypatch, way):
    if way == "torch":
        monkeypatch.setattr(paged_cache, "kernels_for", lambda device: None)
    cache = make_cache()
    before, data = cache._data.clone(), bytes(export_kv(cache, [1, 2], 8, 0, 3))
    for wrong in (data[:-1], data + b"\0", data[: len(data) // 2], b""):
        with pytest.raises(ValueError, match="do not fill"):
            import_kv(cache, [3, 4], wrong, 0, 3)
    for blocks, layers in (([NUM_BLOCKS, 1], (0, 3)), ([-1, 1], (0, 3)), ([3, 4], (1, 3)), ([3, 4], (0, 0))):
        with pytest.raises(ValueError, match=r"must be in|no layers"):
            import_kv(cache, blocks, data, *layers)
        with pytest.raises(ValueError, match=r"must be in|no layers"):
            export_kv(cache, blocks, 8, *layers)
    for num_used in (-1, 5):
        with pytest.raises(ValueError, match="a block has 4 slots"):
            cache.export_blocks([3], num_used)
    assert torch.equal(cache._data, before)


@pytest.mark.parametrize("wrap", [bytes, bytearray, lambda b: memoryview(b"x" + b)[1:], np.frombuffer])
def test_any_buffer_is_read_where_it_is(wrap):
    cache = make_cache()
    data = bytes(export_kv(cache, [1, 2], 8, 0, 3))
    import_kv(cache, [3, 4], wrap(data, np.uint8) if wrap is np.frombuffer else wrap(data), 0, 3)
    assert bytes(export_kv(cache, [3, 4], 8, 0, 3)) == data
