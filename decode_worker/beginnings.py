"""What stores have of prompts that come to a decode worker without KV.

It is fetched into their blocks, off the step loop, so that only the rest is computed
(decode_worker/local_prefill.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from decode_worker.sequence import DecodeSequence
from kvstore.key import Buffer
from kvstore.prefix_reader import PrefixReader, Wanted
from kvstore.records import ChunkHeader, ChunkRange
from tandem.engine.block_pool import BlockPool
from tandem.engine.kv_transfer import import_kv
from tandem.engine.paged_cache import PagedCache
from tandem.threads import to_thread_to_end
from tandem.token_cost import TokenCost


class StoredBeginnings:
    """One decode worker's use of cached prefixes. Who computes prompts tells `cost` what that takes."""

    def __init__(self, reader: PrefixReader, cache: PagedCache, pool: BlockPool) -> None:
        self.cost = TokenCost()
        self._reader = reader
        self._cache = cache
        self._pool = pool

    def may_help(self, sequence: DecodeSequence) -> bool:
        return self._reader.may_help(len(sequence.work.token_ids))

    async def restore(self, sequence: DecodeSequence) -> None:
        """Place the pieces that follow the blocks which the sequence shares. It computes what is missing."""
        began_s, work, form = time.monotonic(), sequence.work, self._reader.form
        num_shared = self._pool.num_shared(*work.key)  # blocks with KV in them, which are not written to
        first = num_shared // form.num_blocks

        async def place(number: int, chunk: ChunkHeader, payload: memoryview) -> None:
            start = (first + number) * form.num_blocks + chunk.block_start
            blocks = sequence.blocks[start : start + chunk.num_blocks]
            await place_chunk(self._cache, blocks, num_shared - start, chunk, payload, "raw", form.dtype)

        found = (await self._reader.find(work.tenant, work.token_ids[:-1]))[first:]
        if not found:
            return
        wanted = Wanted(work.tenant, f"decode/{work.request_id}/{work.epoch}", place, lambda: True)
        num_pieces = await self._reader.fetch(found, wanted)
        if num_pieces:
            sequence.num_computed = (first + num_pieces) * form.tokens
        num_prompt, token_s = work.num_prompt_tokens, self.cost.per_token_s
        sequence.hit = self._reader.count(num_pieces, num_prompt, began_s, token_s)

    async def close(self) -> None:
        await self._reader.close()


async def place_chunk(
    cache: PagedCache,
    blocks: Sequence[int],
    num_there: int,
    where: ChunkRange,
    payload: Buffer,
    codec: str,
    dtype: str,
) -> None:
    """Fill a chunk's `blocks`, but for the first `num_there` of them, which may be less than none."""
    view, skip = memoryview(payload), max(0, num_there)
    rest = view[skip * (view.nbytes // where.num_blocks) :]
    await to_thread_to_end(
        import_kv, cache, blocks[skip:], rest, where.layer_start, where.num_layers, codec, dtype
    )
