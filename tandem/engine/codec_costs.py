"""What each codec costs on this machine, measured once at load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tandem.engine.kv_codec import decode, encode, vector_bytes
from tandem.engine.paged_cache import PagedCache
from tandem.geometry import KV_CODECS

SAMPLE_BYTES = 1 << 20
REPEATS = 3


@dataclass(frozen=True, slots=True)
class CodecCost:
    """Of one raw byte of KV."""

    codec: str
    wire_bytes: float
    encode_s: float
    decode_s: float

    def seconds(self, bytes_per_s: float) -> float:
        """To bring it over a link of that bandwidth."""
        return self.encode_s + self.wire_bytes / bytes_per_s + self.decode_s


def measure_codecs(cache: PagedCache, raw_dtype: str) -> list[CodecCost]:
    """`raw` and every codec that makes this cache's KV smaller than it is raw, in that dtype."""
    head_dim, dtype = cache.geometry.head_dim, getattr(torch, raw_dtype)
    vectors = max(1, SAMPLE_BYTES // vector_bytes("raw", head_dim, dtype))
    sample = torch.randn(vectors, head_dim).to(dtype)
    smaller = [codec for codec in KV_CODECS if _can_shrink(codec, head_dim, dtype)]
    return [CodecCost("raw", 1.0, 0.0, 0.0), *(_measure(codec, sample) for codec in smaller)]


def _can_shrink(codec: str, head_dim: int, dtype: torch.dtype) -> bool:
    try:
        return vector_bytes(codec, head_dim, dtype) < vector_bytes("raw", head_dim, dtype)
    except ValueError:
        return False


def _measure(codec: str, sample: torch.Tensor) -> CodecCost:
    data = encode(sample, codec)
    return CodecCost(
        codec,
        data.nbytes / sample.nbytes,
        _best_s(lambda: encode(sample, codec)) / sample.nbytes,
        _best_s(lambda: decode(data, codec, sample.shape[-1], sample.dtype)) / sample.nbytes,
    )


def _best_s(work: Callable[[], torch.Tensor]) -> float:
    times = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return min(times)
