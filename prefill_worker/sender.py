"""One stored object on its way out: the blocks of one cache in order, in parts of bounded size."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from kvstore.client import KvClient
from kvstore.key import KvHandle, object_id_of
from kvstore.parts import parts_of
from kvstore.records import ChunkRange, ObjectHeader
from kvstore.writer import KvWriter
from prefill_worker.job import PrefillJob
from prefill_worker.link_codec import LinkCodec
from tandem.ahead import one_ahead
from tandem.engine.kv_transfer import block_bytes, export_kv
from tandem.engine.paged_cache import PagedCache
from tandem.errors import TandemError
from tandem.geometry import num_blocks
from tandem.profiling.spans import beside
from tandem.threads import to_thread_to_end

log = logging.getLogger(__name__)

T = TypeVar("T")
AT_ONCE = 4  # parts that a thread exports before the next hop: each waits for a core that a forward may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What all objects of a worker have in common."""

    dtype: str  # of raw KV on the wire
    fingerprint: bytes
    chunk_bytes: int
    codec: LinkCodec  # of what goes to a decode worker; prefixes stay raw


def export_part(
    cache: PagedCache,
    blocks: Sequence[int],
    num_tokens: int,
    part: ChunkRange,
    codec: str = "raw",
    dtype: str | None = None,
) -> memoryview:
    """The bytes of a part of `blocks`, which hold `num_tokens` tokens in all; raw in `dtype`."""
    size, last = cache.block_size, part.block_start + part.num_blocks
    num_in_part = min(num_tokens, last * size) - part.block_start * size
    chosen = blocks[part.block_start : last]
    return export_kv(cache, chosen, num_in_part, part.layer_start, part.num_layers, codec, dtype)


class ObjectSender:
    """`async with ObjectSender(…) as sender`: send what is ready, then seal; leaving before that aborts."""

    model = "target"

    def __init__(
        self, client: KvClient, form: Format, job: PrefillJob, cache: PagedCache, blocks: Sequence[int]
    ) -> None:
        self._form = form
        self._job = job
        self._cache = cache
        self._blocks = blocks
        self._num_sent = 0  # blocks
        self._layers_sent = 0  # of the blocks behind those
        self._codec = form.codec.choose()
        self._writer: KvWriter = client.put(self._header())

    async def __aenter__(self) -> Self:
        await self._writer.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._writer.__aexit__(kind, error, trace)

    @property
    def handle(self) -> KvHandle:
        """The object's name, before it can be read."""
        return self._writer.handle

    def layers_in_part(self, num_ready: int) -> int:
        """How many layers of what was not sent up to that block fill a message."""
        num_bytes = self._cache.block_bytes * max(1, num_ready - self._num_sent)
        return max(1, self._form.chunk_bytes * self._cache.geometry.num_layers // num_bytes)

    async def send(self, num_ready: int, num_layers: int | None = None) -> None:
        """What was not sent up to that block, in all or the first layers; stops early when nobody wants it.

        After some layers the next call is for more layers of the same blocks.
        """
        began_ns = time.monotonic_ns()
        most, size = self._cache.geometry.num_layers, self._cache.block_bytes
        layers = range(self._layers_sent, most if num_layers is None else num_layers)
        parts = parts_of(most, size, self._form.chunk_bytes, self._num_sent, num_ready, layers)
        some = [parts[first : first + AT_ONCE] for first in range(0, len(parts), AT_ONCE)]
        async with aclosing(one_ahead(partial(self._export, each) for each in some)) as exported:
            async for payloads in exported:
                for part, payload in payloads:
                    if self._job.is_cancelled:
                        return
                    with beside("transfer out"):
                        await self._writer.write(part, payload)
        self._layers_sent = layers.stop % most
        if not self._layers_sent:
            self._num_sent = num_ready
        self._job.send_ns += time.monotonic_ns() - began_ns

    async def seal(self) -> KvHandle:
        handle = await self._writer.seal()
        self._form.codec.note(handle.num_bytes, self._writer.busy_s)
        return handle

    def _header(self) -> ObjectHeader:
        """The stored object's description: whole blocks, all layers."""
        blocks = num_blocks(self._job.num_tokens, self._cache.block_size)
        return ObjectHeader(
            object_id=object_id_of("", self._job.work.request_id, self.model),
            epoch=self._job.work.epoch,
            tenant=self._job.work.tenant,
            fingerprint=self._form.fingerprint,
            codec=self._codec,
            dtype=self._form.dtype,
            num_layers=self._cache.geometry.num_layers,
            num_tokens=self._job.num_tokens,
            block_size=self._cache.block_size,
            num_blocks=blocks,
            total_bytes=blocks * block_bytes(self._cache, self._codec, self._form.dtype),
        )

    async def _export(self, parts: Sequence[ChunkRange]) -> list[tuple[ChunkRange, memoryview]]:
        encoding = self._codec, self._form.dtype

        def export() -> list[tuple[ChunkRange, memoryview]]:
            named = self._cache, self._blocks, self._job.num_tokens
            return [(part, export_part(*named, part, *encoding)) for part in parts]

        return await to_thread_to_end(export)


class _DraftObjectSender(ObjectSender):
    model = "draft"


class DraftSender:
    """The same for a draft model's KV, as well as it goes: after the first failure it does nothing more."""

    def __init__(
        self, client: KvClient, form: Format, job: PrefillJob, cache: PagedCache | None, blocks: Sequence[int]
    ) -> None:
        self._job = job
        self._sender = _DraftObjectSender(client, form, job, cache, blocks) if cache else None

    async def __aenter__(self) -> Self:
        if self._sender is not None:
            try:
                await self._sender.__aenter__()
            except TandemError as error:
                self._give_up(error)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sender is not None:
            await self._sender.__aexit__(kind, error, trace)

    async def send(self, num_ready: int) -> None:
        """As `ObjectSender.send`, unless the draft model could not read the prompt."""
        if self._sender is not None and self._job.has_draft_kv:
            await self._attempt(self._sender.send(num_ready))

    async def seal(self) -> KvHandle | None:
        """The handle, if the object is complete."""
        if self._sender is None or not self._job.has_draft_kv:
            return None
        return await self._attempt(self._sender.seal())

    async def _attempt(self, step: Awaitable[T]) -> T | None:
        try:
            return await step
        except TandemError as error:
            if sender := self._give_up(error):
                await sender.__aexit__(None, None, None)
            return None

    def _give_up(self, error: TandemError) -> ObjectSender | None:
        log.warning("the draft's KV of %s stays behind: %s", self._job.work.request_id, error.reason)
        sender, self._sender = self._sender, None
        return sender
