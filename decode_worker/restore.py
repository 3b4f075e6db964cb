"""Brings a prompt's KV from the store into blocks that are already reserved, off the step loop.

The blocks carry a hold of their own while bytes may still be written into them, so a request that is
cancelled meanwhile gives them back only after the last write.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager

from decode_worker.beginnings import StoredBeginnings, place_chunk
from decode_worker.sequence import DecodeSequence, Started
from kvstore.client import KvClient
from kvstore.key import KvHandle, object_id_of
from kvstore.records import ObjectHeader
from tandem.engine.block_pool import BlockPool
from tandem.engine.paged_cache import PagedCache
from tandem.errors import FailedPrecondition, TandemError
from tandem.prefix_usage import PrefixReport
from tandem.profiling.spans import beside
from tandem.token_cost import TokenCost
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
        report: PrefixReport | None = None,
        beginnings: StoredBeginnings | None = None,
    ) -> None:
        self._client = client
        self._cache = cache
        self._pool = pool
        self._draft_cache = draft_cache
        self._report = report
        self._beginnings = beginnings
        self._token_cost = beginnings.cost if beginnings is not None else TokenCost()
        self._codec = codec  # the writer's too: it is part of the fingerprint. auto: each header says

    @property
    def may_follow(self) -> bool:
        """Whether KV is worth fetching while it is written."""
        return self._client.may_follow

    async def follow(self, work: Work, handle: KvHandle, blocks: Sequence[int]) -> int:
        """Place the KV of all tokens as the store gets it; nanoseconds spent on placing it.

        Raises what `restore` raises.
        """
        _check(handle, work, len(work.token_ids))
        with self._held(work), beside("transfer in"):
            return await self._place(work, handle, blocks, self._cache, follow=True)

    async def restore(self, sequence: DecodeSequence, *, has_kv: bool = False) -> Started:
        """Place the KV of all tokens but the last, unless it is there; that of a draft model too, if it came
        and is sound.

        Raises `TandemError`: STALE_HANDLE, NO_SUCH_HANDLE, STORE_DOWN, or KV_CORRUPT from the client;
        FINGERPRINT_MISMATCH or STALE_HANDLE if the handle is not of this request's KV.
        """
        work, handle = sequence.work, sequence.handle
        assert handle is not None
        _check(handle, work, len(work.token_ids) - 1)
        with self._held(work), beside("transfer in"):
            started_ns = time.monotonic_ns()
            if not has_kv:
                await self._place(work, handle, sequence.blocks, self._cache)
            if handle.draft is not None and self._draft_cache is not None:
                await self._place_draft(sequence, handle.draft, self._draft_cache)
            done_ns = time.monotonic_ns()
        return Started(started_ns - sequence.arrived_ns, done_ns - started_ns)

    async def restore_beginning(self, sequence: DecodeSequence) -> None:
        """Place what the stores have of a prompt that comes without KV; the rest is computed."""
        if self._beginnings is not None and self._beginnings.may_help(sequence):
            with self._held(sequence.work):
                await self._beginnings.restore(sequence)

    @property
    def token_cost(self) -> TokenCost:
        """What computing a prompt token takes here, for those who learn it."""
        return self._token_cost

    async def close(self) -> None:
        """Let go of other stores."""
        if self._beginnings is not None:
            await self._beginnings.close()

    @contextmanager
    def _held(self, work: Work) -> Iterator[None]:
        self._pool.hold(work.request_id, HOLD, generation=work.epoch)
        try:
            yield
        finally:
            self._pool.release(work.request_id, generation=work.epoch, hold=HOLD)

    async def _place(
        self, work: Work, handle: KvHandle, blocks: Sequence[int], cache: PagedCache, *, follow: bool = False
    ) -> int:
        """Nanoseconds spent on placing what came. Shared blocks have their KV, and are left alone."""
        spent_ns = num_bytes = 0
        first = self._pool.num_shared(*work.key) if cache is self._cache else 0
        headers: list[ObjectHeader] = []
        reading = self._client.get(
            handle, _holder(work), follow=follow, on_header=headers.append, first_block=first
        )
        async with aclosing(reading) as chunks:
            async for chunk, payload in chunks:
                coding = self._coding_of(headers[0])
                began_ns = time.monotonic_ns()
                num_bytes += len(payload)
                start = chunk.block_start
                chosen = blocks[start : start + chunk.num_blocks]
                await place_chunk(cache, chosen, first - start, chunk, payload, *coding)
                spent_ns += time.monotonic_ns() - began_ns
        if first and self._report is not None:
            self._report.num_bytes += handle.num_bytes - num_bytes
        return spent_ns

    def _coding_of(self, header: ObjectHeader) -> tuple[str, str]:
        """The codec, and the dtype of raw numbers."""
        if self._codec not in ("auto", header.codec):
            raise FailedPrecondition("FINGERPRINT_MISMATCH", "prefill and decode builds differ")
        return header.codec, header.dtype

    async def _place_draft(self, sequence: DecodeSequence, handle: KvHandle, cache: PagedCache) -> None:
        """Without it the draft reads the prompt by itself."""
        try:
            _check(handle, sequence.work, len(sequence.work.token_ids) - 1, "draft")
            await self._place(sequence.work, handle, sequence.blocks, cache)
        except TandemError as error:
            log.warning("the draft's KV of %s did not come: %s", sequence.work.request_id, error.reason)
            return
        sequence.num_draft_computed = handle.num_tokens

    async def give_up_stored(self, sequence: DecodeSequence) -> None:
        """The stored copy is no longer needed. What a lost store misses, the lease frees."""
        try:
            for handle in sequence.handle.objects if sequence.handle else ():
                await self._client.release(handle)
        except TandemError as error:
            log.warning("could not release stored KV: %s", error.reason)


def _check(handle: KvHandle, work: Work, needed: int, model: str = "target") -> None:
    """KV of other tokens or of another build would become wrong text."""
    if handle.fingerprint != work.fingerprint:
        raise FailedPrecondition("FINGERPRINT_MISMATCH", "prefill and decode builds differ")
    if handle.num_tokens != needed or handle.object_id != object_id_of("", work.request_id, model):
        raise FailedPrecondition("STALE_HANDLE", f"handle is not of the {needed} tokens to continue from")


def _holder(work: Work) -> str:
    return f"{work.request_id}/{work.epoch}"
