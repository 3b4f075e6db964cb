"""Worker descriptions for tests."""

from __future__ import annotations

from dataclasses import replace

from router.registry import WorkerInfo, WorkerRole

FINGERPRINT = b"f" * 32
BASE = WorkerInfo(
    worker_id="d0",
    incarnation="1",
    role=WorkerRole.DECODE,
    address="127.0.0.1:1",
    fingerprint=FINGERPRINT,
    block_size=16,
    num_blocks=640,
    block_bytes=1024,
)


def decode_worker(worker_id: str = "d0", num_blocks: int = 640, **changes) -> WorkerInfo:
    return replace(BASE, worker_id=worker_id, num_blocks=num_blocks, **changes)


def prefill_worker(worker_id: str = "p0", num_blocks: int = 256, **changes) -> WorkerInfo:
    return replace(BASE, role=WorkerRole.PREFILL, worker_id=worker_id, num_blocks=num_blocks, **changes)
