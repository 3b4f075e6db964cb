"""The KV benchmark moves what it says it moves, and its yardsticks work."""

from __future__ import annotations

import pytest
import torch

from bench.kv import blocks, growth, handoff, run
from bench.kv.arms import Shape, checked_copy, memcpy, memcpy_into, peer
from tandem.errors import ConfigError

SHAPE = Shape(num_bytes=4 << 20, chunk_bytes=256 << 10, num_channels=2)


@pytest.mark.slow
def test_every_arm_moves_its_bytes(tmp_path):
    url = f"shm://?bytes={16 << 20}+disk://{tmp_path}"
    with peer(url) as store:
        [cell] = [run._cell(url, store, SHAPE, 1)]
        handles = list(store._handles)
    assert cell.backend == "shm:// + disk://"
    assert [handle.num_bytes for handle in handles] == [2 << 20] * 2
    assert min(cell.put.low, cell.get.low, cell.raw_put.low, cell.raw_get.low, cell.memcpy.low) > 0
    assert cell.put_of_memcpy.median == pytest.approx(cell.put.median / cell.memcpy_into.median)
    assert cell.put_of_raw.median == pytest.approx(cell.put.median / cell.raw_put.median)


def test_a_store_that_cannot_be_opened_is_said():
    with pytest.raises(ConfigError, match="zip://"), peer("zip://x"):
        pass


def test_the_yardsticks_copy():
    source, target = bytes(range(256)) * (SHAPE.num_bytes // 256), memoryview(bytearray(SHAPE.chunk_bytes))
    region = memoryview(bytearray(SHAPE.num_bytes))
    assert memcpy_into(memoryview(source)[: SHAPE.chunk_bytes], region, SHAPE) > 0
    assert region == source, "every chunk of it is the same"
    for copy in (memcpy, checked_copy):
        target[:] = bytes(SHAPE.chunk_bytes)
        assert copy(source, target, SHAPE) > 0
        assert target == source[-SHAPE.chunk_bytes :]


def test_blocks_move_by_kernels_and_by_torch():
    threads = torch.get_num_threads()
    rows = blocks.measure(1)
    assert torch.get_num_threads() == threads
    assert [row.shape for row in rows] == ["bundled", "111M"]
    for row in rows:
        assert row.out_of_torch.median == pytest.approx(row.out.median / row.torch_out.median)
        assert row.back_of_memcpy.median == pytest.approx(row.back.median / row.memcpy.median)


def test_growth_counts_objects(monkeypatch):
    monkeypatch.setattr(growth, "ROUNDS", 10)
    rows = growth.measure([10, 30])
    assert [row.num_objects for row in rows] == [10, 30]
    assert all(row.life_us > 0 for row in rows)


@pytest.mark.long
def test_the_gap_is_measured_with_and_without_overlap():
    rows = handoff._case(300, 150, 1)
    assert [(row.prompt_tokens, row.chunks, row.overlap) for row in rows] == [(300, 2, True), (300, 2, False)]
    assert all(row.gap_ms.low > 0 and row.transfer_ms.low > 0 for row in rows)
    assert all(0 <= row.hidden.low <= 1 for row in rows)
