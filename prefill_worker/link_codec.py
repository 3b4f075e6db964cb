"""In which codec a prompt's KV leaves: the configured one, or the one that brings it over soonest.

With `kvstore.codec: auto` each object takes the codec whose encoding, transfer and decoding together take
the least time, from costs measured at load and the bandwidth of recent puts. The object's header says which
it is; tokens then depend on the link, so `auto` promises no exactness.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from tandem.engine.codec_costs import CodecCost, measure_codecs
from tandem.engine.paged_cache import PagedCache

log = logging.getLogger(__name__)

RECENT = 16  # puts
LEAST_BYTES = 256 << 10  # a smaller put tells of latency, not of bandwidth


class LinkCodec:
    """Chooses among `costs`, the first of which is taken until the link has been measured."""

    def __init__(self, costs: Sequence[CodecCost]) -> None:
        self._costs = costs
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # bytes on the wire, seconds
        self._last = ""

    @classmethod
    def of(cls, codec: str, cache: PagedCache, dtype: str) -> LinkCodec:
        """For the value of `kvstore.codec`, where raw KV travels in `dtype`."""
        if codec == "auto":
            return cls(measure_codecs(cache, dtype))
        return cls([CodecCost(codec, 1.0, 0.0, 0.0)])

    @property
    def bytes_per_s(self) -> float | None:
        """Of recent puts; None before there were any."""
        seconds = sum(took_s for _, took_s in self._recent)
        return sum(num_bytes for num_bytes, _ in self._recent) / seconds if seconds else None

    def note(self, num_bytes: int, seconds: float) -> None:
        """What a put has sent, and how long that took."""
        if num_bytes >= LEAST_BYTES and seconds > 0:
            self._recent.append((num_bytes, seconds))

    def choose(self) -> str:
        """For the next object."""
        bandwidth = self.bytes_per_s
        if bandwidth is None:
            return self._costs[0].codec
        chosen = min(self._costs, key=lambda cost: cost.seconds(bandwidth)).codec
        if chosen != self._last:
            log.info("KV leaves in codec %s: the link takes %.1f MB/s", chosen, bandwidth / 1e6)
            self._last = chosen
        return chosen
