"""Slots, blocks and bytes of the paged cache, without a model."""

import threading

import numpy as np
import pytest
import torch

from tandem.engine.paged_cache import PagedCache, all_finite
from tandem.geometry import ModelGeometry

GEOMETRY = ModelGeometry(
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    vocab_size=16,
    max_context=64,
    num_parameters=0,
)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def cache(request):
    return PagedCache(GEOMETRY, num_blocks=6, block_size=4, dtype=request.param)


def fill(cache, seed=0):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.arange(24)
    for layer in range(3):
        k, v = torch.randn(2, 24, 2, 8, generator=generator).to(cache.dtype)
        cache.write(layer, slots, torch.cat((k, v), 1))


def to_bytes(tensor):
    return tensor.view(torch.uint8).numpy().tobytes()


def test_read_blocks_is_the_wire_layout(cache):
    fill(cache)
    blocks = cache.read_blocks([5, 2])
    assert blocks.shape == (2, 3, 2, 4, 2, 8)
    assert blocks.is_contiguous()
    assert len(to_bytes(blocks)) == 2 * cache.block_bytes == 2 * GEOMETRY.block_bytes(4, str(cache.dtype)[6:])
    keys, values = cache.gather(1, cache.head_block_index(torch.tensor([[5, cache.zero_block, 2]])), 2)
    wanted = blocks[:, 1].permute(1, 3, 0, 2, 4)  # [2, kv_heads, num_blocks, block_size, head_dim]
    assert torch.equal(keys.view(2, 3, 4, 8)[:, [0, 2]], wanted[0])
    assert torch.equal(values.view(2, 3, 4, 8)[:, [0, 2]], wanted[1])
    assert not keys.view(2, 3, 4, 8)[:, 1].any()


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda b: memoryview(b"x" + b)[1:]])
def test_round_trip_to_other_blocks(cache, wrap):
    """Read-only, writable and unaligned buffers, a group of layers at a time."""
    fill(cache)
    before = cache.read_blocks([0, 1, 2])
    for start, count in ((0, 2), (2, 1)):
        cache.write_blocks(
            [5, 3, 4], wrap(to_bytes(cache.read_blocks([0, 1, 2], start, count))), start, count
        )
    assert torch.equal(cache.read_blocks([5, 3, 4]), before)
    assert torch.equal(cache.read_blocks([0, 1, 2]), before)


def test_refuses_wrong_sizes_and_ids(cache):
    with pytest.raises(ValueError, match="bytes"):
        cache.write_blocks([0], b"\0")
    with pytest.raises(ValueError, match="block ids"):
        cache.read_blocks([6])  # the zero block is nobody's
    with pytest.raises(ValueError, match="layers"):
        cache.read_blocks([0], 2, 2)


def test_no_blocks_are_no_bytes(cache):
    cache.write_blocks([], to_bytes(cache.read_blocks([])))


def test_check_finite_looks_at_the_tokens_asked_for(cache):
    cache.write(2, torch.tensor([9]), torch.full((1, 4, 8), float("nan"), dtype=cache.dtype))
    assert cache.check_finite([1, 2], 5)
    assert not cache.check_finite([1, 2], 6)


def test_threads_write_disjoint_blocks():
    cache = PagedCache(GEOMETRY, num_blocks=64, block_size=4)
    source = np.random.default_rng(0).standard_normal((64, 3, 2, 4, 2, 8), np.float32)

    def write(first):
        for block in range(first, 64, 4):
            cache.write_blocks([block], source[block].tobytes())

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(cache.read_blocks(range(64)).numpy(), source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 777, 4094])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype, bad, place):
    values = torch.randn(3, 5, 273, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(values)
    values.view(-1)[place] = bad
    assert not all_finite(values)
    assert all_finite(torch.full((1,), torch.finfo(dtype).max, dtype=dtype))
