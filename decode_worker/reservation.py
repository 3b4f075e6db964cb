"""Takes all blocks a request may ever need before anything is fetched for it; waits a moment if it must."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from decode_worker.reuse import BlockNames
from tandem.engine.block_pool import BlockPool
from tandem.errors import InvalidRequest, Overloaded
from tandem.geometry import num_blocks
from tandem.work import Work

PATIENCE_S = 1.0


class Reservations:
    """The way into a decode worker's pool. Lives on the event loop.

    `make_room` is called for a request that finds none: whoever holds blocks without need lets go. With
    `names` a request gets blocks that earlier ones with the same beginning have left, to share.
    """

    def __init__(
        self, pool: BlockPool, make_room: Callable[[], None], names: BlockNames | None = None
    ) -> None:
        self._pool = pool
        self._names = names
        self._make_room = make_room
        self._freed = asyncio.Event()  # replaced each time it is set

    def check_fits(self, work: Work) -> None:
        """Raise NEVER_FITS if the pool is too small for the longest possible output."""
        needed, most = num_blocks(work.max_total_tokens, self._pool.block_size), self._pool.num_blocks
        if needed > most:
            raise InvalidRequest("NEVER_FITS", f"request needs {needed} KV blocks; the worker has {most}")

    async def take(self, work: Work) -> list[int]:
        """The request's blocks, or NO_MEMORY_FIT_NOW after a moment's patience."""
        patience_s, owner = time.monotonic() + PATIENCE_S, (work.request_id, work.epoch)
        names = self._names.of(work, work.token_ids[:-1]) if self._names else ()
        while True:
            blocks = self._pool.allocate(owner[0], work.max_total_tokens, generation=owner[1], names=names)
            if blocks is not None:
                if self._names is not None:
                    self._names.note(self._pool.num_shared(*owner))
                return blocks
            self._make_room()
            try:
                async with asyncio.timeout_at(patience_s):
                    await self._freed.wait()
            except TimeoutError:
                raise Overloaded(
                    "NO_MEMORY_FIT_NOW", "no worker has room now; retry in 1000 ms", retry_after_ms=1000
                ) from None

    def note_freed(self) -> None:
        """Blocks were freed: those that wait for some try again."""
        self._freed.set()
        self._freed = asyncio.Event()
