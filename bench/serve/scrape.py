"""The server's own figures during a run, read from its /metrics (Prometheus' text format) twice a second.

| read | shown |
|---|---|
| `tandem_requests_waiting`, `tandem_requests_running` | queue and running requests |
| `tandem_kv_reserved_bytes` / `tandem_kv_capacity_bytes` | KV occupancy of each worker and of the store |
| `tandem_spec_accepted_tokens_total`, `tandem_spec_draft_tokens_total` | acceptance between two readings |
"""

from __future__ import annotations

import asyncio
import itertools
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.serve.sse import get
from tandem.errors import ConfigError

EVERY_S = 0.5
TIMEOUT_S = 5.0
LINE = re.compile(
    rb"^tandem_(requests_waiting|requests_running|kv_reserved_bytes|kv_capacity_bytes|spec_draft_tokens_total"
    rb"|spec_accepted_tokens_total)(?:\{([^}]*)\})? (\S+)$",
    re.MULTILINE,
)
WORKER = re.compile(rb'worker="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading. `at_s` is seconds from the start of the run; the tokens are sums since workers began."""

    at_s: float
    waiting: float
    running: float
    kv: Mapping[str, float]  # share of the capacity that is reserved, by worker
    drafted: float
    accepted: float


def read(text: bytes, at_s: float) -> Reading | None:
    """None if the text has none of these figures, as another server's."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in LINE.findall(text):
        worker = WORKER.search(labels)
        key = worker.group(1).decode() if worker else ""
        found.setdefault(name.decode(), {})[key] = float(value)
    if not found:
        return None
    sums = {name: sum(values.values()) for name, values in found.items()}
    reserved = found.get("kv_reserved_bytes", {})
    return Reading(
        at_s=round(at_s, 3),
        waiting=sums.get("requests_waiting", 0.0),
        running=sums.get("requests_running", 0.0),
        kv={
            worker: round(reserved.get(worker, 0.0) / capacity, 5)
            for worker, capacity in found.get("kv_capacity_bytes", {}).items()
            if capacity
        },
        drafted=sums.get("spec_draft_tokens_total", 0.0),
        accepted=sums.get("spec_accepted_tokens_total", 0.0),
    )


@dataclass(slots=True)
class Scraper:
    """Reads one URL. What fails is counted, and the run goes on without it."""

    url: str
    token: str | None = None
    tls_ca: Path | None = None
    readings: list[Reading] = field(default_factory=list)
    num_failed: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url} is no URL such as http://127.0.0.1:8000/metrics")

    async def follow(self, now: Callable[[], float]) -> None:
        """Read until cancelled. `now` is seconds from the start of the run."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        tls = ssl.create_default_context(cafile=self.tls_ca) if parts.scheme == "https" else None
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        port = parts.port or (443 if tls else 80)
        while True:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    text = await get(parts.hostname, port, parts.path or "/metrics", headers, tls)
                if reading := read(text, now()):
                    self.readings.append(reading)
                else:
                    self.num_failed += 1
            except (OSError, TimeoutError):
                self.num_failed += 1
            await asyncio.sleep(EVERY_S)


def acceptance(readings: list[Reading]) -> list[tuple[float, float]]:
    """(seconds, accepted / drafted since the reading before), where anything was drafted between."""
    points = []
    for before, after in itertools.pairwise(readings):
        drafted = after.drafted - before.drafted
        if drafted > 0 and after.accepted >= before.accepted:
            points.append((after.at_s, (after.accepted - before.accepted) / drafted))
    return points


def readings_of(values: list[dict[str, Any]]) -> list[Reading]:
    """From JSON."""
    return [Reading(**one) for one in values]
