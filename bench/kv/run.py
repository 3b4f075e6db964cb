"""How fast KV crosses the store, next to what the machine allows.

    python -m bench.kv [--backend URL]... [--rounds 5] [--out FOLDER] [--json]

In each cell (backend, chunk size, channels) the store's put and get, a stream of plain bytes over gRPC in
either direction and copies in memory, with and without hashing, take turns; ratios are taken within
rounds. The store is a process of its own. Then: what it takes to gather blocks of a cache into a message
and to place them again; what an operation costs while the store holds more and more objects; what a
request waits between prefill's last step and decode's first, with and without overlap; and what a cached
prefix does to the time to first token of the bundled model.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.kv import blocks, growth, handoff, prefix
from bench.kv.arms import Shape, checked_copy, memcpy, memcpy_into, peer
from bench.measure import Meter, Spread, console, flat, interleave, machine, table, write_csv, write_json
from kvstore.urls import split_tiers
from tandem.redis_url import redacted

TOTAL_BYTES = 64 << 20
CHUNKS = (256 << 10, 1 << 20, 4 << 20)
CHANNELS = (1, 4)
COUNTS = (1_000, 10_000, 100_000)
MANY = 1_000_000  # takes gigabytes
PREFIX_STORES = ("memory://", "shm://")  # over gRPC, and where it lies


@dataclass(frozen=True, slots=True)
class Cell:
    """Gigabytes per second, and the store's over the yardsticks'."""

    backend: str
    chunk_kib: int
    channels: int
    put: Spread
    get: Spread
    raw_put: Spread
    raw_get: Spread
    memcpy: Spread  # from all over into one warm chunk, as a get
    memcpy_into: Spread  # from one warm chunk to all over, as a put
    checked: Spread  # a copy in memory that hashes what it copies
    put_of_raw: Spread
    get_of_raw: Spread
    put_of_memcpy: Spread
    get_of_memcpy: Spread
    get_of_checked: Spread


def default_backends(folder: Path) -> list[str]:
    return ["memory://", "shm://", f"disk://{folder}"]


def run(backends: Sequence[str], rounds: int, out: Path, full: bool, as_json: bool) -> dict[str, Any]:
    """Measure, show, write; returns the document."""
    with tempfile.TemporaryDirectory() as folder:
        urls = list(backends) or default_backends(Path(folder))
        cells = _transfers(urls, rounds)
    moved = blocks.measure(rounds)
    grown = growth.measure([*COUNTS, *((MANY,) if full else ())])
    handed = handoff.measure(rounds)
    hits = {url: prefix.measure(url, rounds) for url in PREFIX_STORES}
    shown = console(as_json)
    shown.print(_cells_table(cells))
    shown.print(_blocks_table(moved))
    shown.print(_growth_table(grown))
    shown.print(_handoff_table(handed))
    for url, hit in hits.items():
        shown.print(_prefix_line(url, hit))
    rows = [flat(cell) for cell in cells]
    document = {
        "machine": machine(1),
        "cells": rows,
        "blocks": [flat(row) for row in moved],
        "growth": [dataclasses.asdict(row) for row in grown],
        "handoff": [flat(row) for row in handed],
        "prefix_hits": {url: flat(hit) for url, hit in hits.items()},
    }
    write_json(out / "kv.json", document)
    write_csv(out / "kv.csv", rows)
    shown.print(f"\nkv.json and kv.csv are in {out}")
    return document


def _prefix_line(url: str, hit: prefix.PrefixHit) -> str:
    speedup, cold, warm = hit.speedup, hit.cold_ms.median, hit.hit_ms.median
    return (
        f"{prefix.CACHED_TOKENS} prompt tokens cached in {url}: first token after {warm:.0f} ms, "
        f"not {cold:.0f}, {speedup.median:.1f} times sooner ({speedup.low:.1f} to {speedup.high:.1f})"
    )


def _transfers(urls: Sequence[str], rounds: int) -> list[Cell]:
    shapes = [Shape(TOTAL_BYTES, chunk, channels) for chunk in CHUNKS for channels in CHANNELS]
    cells = []
    with Meter("transfers", len(urls) * len(shapes)) as meter:
        for url in urls:
            with peer(url) as store:
                for shape in shapes:
                    meter.say(
                        f"{redacted(url)}, {shape.chunk_bytes >> 10} KiB, {shape.num_channels} channels"
                    )
                    cells.append(_cell(redacted(url), store, shape, rounds))
                    meter.step()
    return cells


def _cell(backend: str, store: Any, shape: Shape, rounds: int) -> Cell:
    source, target = os.urandom(shape.num_bytes), memoryview(bytearray(shape.chunk_bytes))
    region = memoryview(bytearray(source))
    arms: dict[str, Callable[[], tuple[float, ...]]] = {
        "put": partial(_put_then_get, store, shape),
        "raw_put": lambda: (store.raw_put(shape), store.raw_get(shape)),
        "memcpy": lambda: (
            memcpy(source, target, shape),
            memcpy_into(target, region, shape),
            checked_copy(source, target, shape),
        ),
    }
    found = interleave(arms, rounds)
    put, get = zip(*found["put"], strict=True)
    raw_put, raw_get = zip(*found["raw_put"], strict=True)
    copied, copied_into, checked = zip(*found["memcpy"], strict=True)
    return Cell(
        backend=" + ".join(tier.partition("://")[0] + "://" for tier in split_tiers(backend)),
        chunk_kib=shape.chunk_bytes >> 10,
        channels=shape.num_channels,
        put=Spread.of(put),
        get=Spread.of(get),
        raw_put=Spread.of(raw_put),
        raw_get=Spread.of(raw_get),
        memcpy=Spread.of(copied),
        memcpy_into=Spread.of(copied_into),
        checked=Spread.of(checked),
        put_of_raw=Spread.of_ratios(put, raw_put),
        get_of_raw=Spread.of_ratios(get, raw_get),
        put_of_memcpy=Spread.of_ratios(put, copied_into),
        get_of_memcpy=Spread.of_ratios(get, copied),
        get_of_checked=Spread.of_ratios(get, checked),
    )


def _put_then_get(store: Any, shape: Shape) -> tuple[float, float]:
    return store.put(shape), store.get(shape)


def _cells_table(cells: Sequence[Cell]) -> Any:
    columns = [*("backend", "chunk KiB", "channels", "put GB/s", "get GB/s", "raw put", "raw get", "memcpy")]
    columns += ["memcpy in", "with hash", "put/raw", "get/raw", "put/memcpy", "get/memcpy", "get/with hash"]
    names = [field.name for field in dataclasses.fields(Cell)][3:]
    rows = [
        [cell.backend, str(cell.chunk_kib), str(cell.channels)]
        + [f"{getattr(cell, name).median:.2f}" for name in names]
        for cell in cells
    ]
    return table("KV over the store, medians", columns, rows)


def _blocks_table(rows: Sequence[blocks.Moved]) -> Any:
    columns = ["shape", "chunk KiB", "memcpy GB/s", "out", "torch out", "back", "torch back"]
    columns += ["out/torch", "back/torch", "out/memcpy", "back/memcpy"]
    names = [field.name for field in dataclasses.fields(blocks.Moved)][2:]
    cells = [
        (row.shape, str(row.chunk_kib), *(f"{getattr(row, name).median:.2f}" for name in names))
        for row in rows
    ]
    return table("\nblocks of a cache to a message and back, one thread, medians", columns, cells)


def _growth_table(rows: Sequence[growth.Growth]) -> Any:
    cells = [[f"{row.num_objects:,}", f"{row.life_us:.0f}"] for row in rows]
    return table("\nan object's life", ("other objects", "µs"), cells, left=0)


def _handoff_table(rows: Sequence[handoff.HandOff]) -> Any:
    columns = ("prompt", "chunks", "overlap", "prefill ms", "gap ms", "gap/prefill", "transfer ms", "hidden")
    cells = [
        (
            *(str(row.prompt_tokens), str(row.chunks), "yes" if row.overlap else "no"),
            *(f"{row.prefill_ms.median:.0f}", f"{row.gap_ms.median:.1f}", f"{row.gap_of_prefill.median:.1%}"),
            *(f"{row.transfer_ms.median:.1f}", f"{row.hidden.median:.0%}"),
        )
        for row in rows
    ]
    return table("\nfrom prefill's last step to decode's first, medians", columns, cells, left=0)
