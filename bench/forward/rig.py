"""A loaded model over a cache of random numbers, and the forwards that are timed on it.

The cache is filled because memory nobody wrote to is one page of zeros, and costs nothing to read. Positions
may pass the model's context: a forward costs the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench.forward.traffic import Traffic
from bench.measure import dtype_on
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.geometry import DTYPE_BYTES, ModelGeometry, num_blocks

BLOCK_SIZE = 16
FILL_BLOCKS = 256  # at once
TOKEN = 3  # with random weights one is as good as another


class Rig:
    """One thread's engine with room for `max_tokens` of KV."""

    def __init__(self, path: Path, device: str, max_tokens: int) -> None:
        self.dtype = dtype_on(device)
        self.runner = ModelRunner.load(
            path,
            dtype=self.dtype,
            num_blocks=num_blocks(max_tokens, BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            device=device,
        )
        self._fill()

    def traffic(self) -> Traffic:
        """With the weights as this machine keeps them."""
        kernels = (choice.kernel for choice in self.runner.linear_report().values())
        halves = all("fp16" in kernel or "bf16" in kernel for kernel in kernels)
        width = 2 if halves else DTYPE_BYTES[self.dtype]
        return Traffic(self.runner.geometry, width, self.dtype)

    def fits(self, tokens_each: int, batch: int = 1) -> bool:
        """Whether the cache has blocks for that many sequences."""
        return batch * num_blocks(tokens_each, BLOCK_SIZE) <= self.runner.cache.num_blocks

    def decode(self, batch: int, context: int) -> float:
        """Seconds of one step: a row for each of `batch` sequences, on top of `context` tokens each."""
        tables = self._tables(batch, context + 1)
        return self._seconds([SequenceRows((TOKEN,), context, table) for table in tables])

    def prefill(self, num_tokens: int, batch: int = 1) -> float:
        """Seconds of `batch` prompts from nothing, as one forward."""
        tables = self._tables(batch, num_tokens)
        return self._seconds([SequenceRows([TOKEN] * num_tokens, 0, table) for table in tables])

    def with_cache(self, prompt: int) -> Iterator[float]:
        """Seconds of each output token after a prompt: a prefill, then steps."""
        yield self.prefill(prompt)
        while True:
            yield self.decode(1, prompt)
            prompt += 1

    def without_cache(self, prompt: int) -> Iterator[float]:
        """The same by computing all tokens again for each new one."""
        while True:
            yield self.prefill(prompt)
            prompt += 1

    def _tables(self, batch: int, tokens_each: int) -> list[range]:
        each = num_blocks(tokens_each, BLOCK_SIZE)
        return [range(number * each, (number + 1) * each) for number in range(batch)]

    def _seconds(self, sequences: Sequence[SequenceRows]) -> float:
        """Of the forward and of indexing its rows, which every forward needs."""
        return timed(lambda: self.runner.forward(self.runner.batch(sequences)), self.runner.device.type)

    def _fill(self) -> None:
        cache = self.runner.cache
        count = min(FILL_BLOCKS, cache.num_blocks)
        kind = torch.float32 if self.dtype == "float32" else torch.bfloat16
        numbers = torch.randn(count * cache.block_bytes // kind.itemsize, dtype=kind)
        data = memoryview(numbers.view(torch.uint8).numpy().data)
        for first in range(0, cache.num_blocks, count):
            ids = range(first, min(first + count, cache.num_blocks))
            cache.write_blocks(ids, data[: len(ids) * cache.block_bytes])


def timed(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    began_s = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def prefill_bytes(geometry: ModelGeometry, num_tokens: int) -> int:
    """Of the rows of a prompt: hidden state, queries, keys, values and what attention found, in fp32."""
    query, kv = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
    return 4 * num_tokens * (geometry.hidden_size + 2 * query + 2 * kv)
