"""Brings a prompt's KV from the store into blocks that are already reserved, off the step loop.

The blocks carry a hold of their own while bytes may still be written into them, so a request that is
cancelled meanwhile gives them back only after the last write.
"""

from __future__ import annotations

import logging
import time
from contextlib import aclosing

from decode_worker.sequence import DecodeSequence, Started
from kvstore.client import KvClient
from kvstore.key import KvHandle, object_id_of
from tandem.engine.block_pool import BlockPool
from tandem.engine.kv_transfer import import_kv
from tandem.engine.paged_cache import PagedCache
from tandem.errors import FailedPrecondition, TandemError
from tandem.threads import to_thread_to_end
from tandem.work import Work

log = logging.getLogger(__name__)
HOLD = "restore"


class KvRestorer:
    """Fetches, checks and places KV. What was placed is used only after `restore` has returned."""

    def __init__(
        self,
        client: KvClient,
        cache: PagedCache,
        pool: BlockPool,
        draft_cache: PagedCache | None = None,
        codec: str = "raw",
    ) -> None:
        self._client = client
        self._cache = cache
        self._pool = pool
        self._draft_cache = draft_cache
        self._codec = codec  # the writer's too: it is part of the fingerprint

    async def restore(self, sequence: DecodeSequence) -> Started:
        """Place the KV of all tokens but the last; that of a draft model too, if it came and is sound.

        Raises `TandemError`: STALE_HANDLE, NO_SUCH_HANDLE, STORE_DOWN, or KV_CORRUPT from the client;
        FINGERPRINT_MISMATCH or STALE_HANDLE if the handle is not of this request's KV.
        """
        work = sequence.work
        _check(sequence.handle, work)
        self._pool.hold(work.request_id, HOLD, generation=work.epoch)
        try:
            started_ns = time.monotonic_ns()
            await self._place(sequence, sequence.handle, self._cache)
            if sequence.handle.draft is not None and self._draft_cache is not None:
                await self._place_draft(sequence, sequence.handle.draft, self._draft_cache)
            done_ns = time.monotonic_ns()
        finally:
            self._pool.release(work.request_id, generation=work.epoch, hold=HOLD)
        return Started(started_ns - sequence.arrived_ns, done_ns - started_ns)

    async def _place(self, sequence: DecodeSequence, handle: KvHandle, cache: PagedCache) -> None:
        async with aclosing(self._client.get(handle, _holder(sequence))) as chunks:
            async for chunk, payload in chunks:
                blocks = sequence.blocks[chunk.block_start : chunk.block_start + chunk.num_blocks]
                await to_thread_to_end(
                    import_kv, cache, blocks, payload, chunk.layer_start, chunk.num_layers, self._codec
                )

    async def _place_draft(self, sequence: DecodeSequence, handle: KvHandle, cache: PagedCache) -> None:
        """Without it the draft reads the prompt by itself."""
        try:
            _check(handle, sequence.work, "draft")
            await self._place(sequence, handle, cache)
        except TandemError as error:
            log.warning("the draft's KV of %s did not come: %s", sequence.work.request_id, error.reason)
            return
        sequence.num_draft_computed = handle.num_tokens

    async def give_up_stored(self, sequence: DecodeSequence) -> None:
        """The stored copy is no longer needed. What a lost store misses, the lease frees."""
        try:
            for handle in sequence.handle.objects:
                await self._client.release(handle)
        except TandemError as error:
            log.warning("could not release stored KV: %s", error.reason)


def _check(handle: KvHandle, work: Work, model: str = "target") -> None:
    """KV of other tokens or of another build would become wrong text."""
    if handle.fingerprint != work.fingerprint:
        raise FailedPrecondition("FINGERPRINT_MISMATCH", "prefill and decode builds differ")
    needed = len(work.token_ids) - 1
    if handle.num_tokens != needed or handle.object_id != object_id_of("", work.request_id, model):
        raise FailedPrecondition("STALE_HANDLE", f"handle is not of the {needed} tokens to continue from")


def _holder(sequence: DecodeSequence) -> str:
    return f"{sequence.work.request_id}/{sequence.work.epoch}"
