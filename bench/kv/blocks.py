"""Blocks of a cache on their way to a message and back: own kernels, torch, and a copy as the yardstick."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.inflate import BUNDLED
from bench.measure import Spread, interleave
from bench.shapes import SHAPES
from tandem.allocator import keep_pages
from tandem.engine.kv_transfer import export_kv
from tandem.engine.paged_cache import PagedCache
from tandem.geometry import ModelGeometry

MIB = 1 << 20
BLOCK_SIZE = 16
NUM_BLOCKS = 128


@dataclass(frozen=True, slots=True)
class Moved:
    """Gigabytes per second in chunks of about a MiB; ratios are taken within rounds."""

    shape: str
    chunk_kib: int
    memcpy: Spread
    out: Spread
    torch_out: Spread
    back: Spread
    torch_back: Spread
    out_of_torch: Spread
    back_of_torch: Spread
    out_of_memcpy: Spread
    back_of_memcpy: Spread


def measure(rounds: int) -> list[Moved]:
    """One thread, float32 caches of more bytes than processors hold."""
    keep_pages()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bundled = ModelGeometry.from_path(BUNDLED.target)
        return [_measure("bundled", bundled, rounds), _measure("111M", _geometry("111m"), rounds)]
    finally:
        torch.set_num_threads(threads)


def _geometry(name: str) -> ModelGeometry:
    shape = SHAPES[name]
    return ModelGeometry(
        num_layers=shape.num_hidden_layers,
        num_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        max_context=0,
        num_parameters=0,
    )


def _measure(name: str, geometry: ModelGeometry, rounds: int) -> Moved:
    cache = PagedCache(geometry, NUM_BLOCKS, BLOCK_SIZE)
    per_chunk = max(1, MIB // cache.block_bytes)
    firsts = range(0, NUM_BLOCKS - per_chunk + 1, per_chunk)
    chunks = [list(range(first, first + per_chunk)) for first in firsts]
    message = _out(cache, chunks[0])
    region = memoryview(bytearray(NUM_BLOCKS * cache.block_bytes))
    slow = PagedCache(geometry, NUM_BLOCKS, BLOCK_SIZE)
    slow._mover = None  # as where there are no kernels
    arms: dict[str, Callable[[list[int]], object]] = {
        "memcpy": partial(_copy, region, message),
        "out": partial(_out, cache),
        "torch_out": partial(_out, slow),
        "back": partial(cache.write_blocks, data=message),
        "torch_back": partial(slow.write_blocks, data=message),
    }
    timed = {arm: partial(_timed, move, chunks, len(message)) for arm, move in arms.items()}
    found = interleave(timed, rounds)
    return Moved(
        name,
        len(message) >> 10,
        **{arm: Spread.of(rates) for arm, rates in found.items()},
        out_of_torch=Spread.of_ratios(found["out"], found["torch_out"]),
        back_of_torch=Spread.of_ratios(found["back"], found["torch_back"]),
        out_of_memcpy=Spread.of_ratios(found["out"], found["memcpy"]),
        back_of_memcpy=Spread.of_ratios(found["back"], found["memcpy"]),
    )


def _timed(move: Callable[[list[int]], object], chunks: list[list[int]], num_bytes: int) -> float:
    began_s = time.perf_counter()
    for chunk in chunks:
        move(chunk)
    return len(chunks) * num_bytes / (time.perf_counter() - began_s) / 1e9


def _copy(region: memoryview, message: memoryview, blocks: list[int]) -> None:
    start = blocks[0] * len(message) // len(blocks)
    region[start : start + len(message)] = message


def _out(cache: PagedCache, blocks: list[int]) -> memoryview:
    return export_kv(cache, blocks, len(blocks) * BLOCK_SIZE, 0, cache.geometry.num_layers)
