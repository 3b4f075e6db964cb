"""Beginnings of prompts that were computed before: found in the stores, and brought into a worker's blocks.

Chunks of a prompt are computed to the same bits wherever they are cut, so a piece that comes from a store
changes no token. What the worker's own store lacks may be in another one (kvstore/elsewhere.py).

Whatever fails here costs time and nothing else: the worker computes what it could not get. Lives on the event
loop; where the bytes go is its caller's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import cast

from kvstore.client import KvClient
from kvstore.elsewhere import Elsewhere, PieceElsewhere
from kvstore.key import KvHandle
from kvstore.pieces import Pieces
from kvstore.records import ChunkHeader
from tandem.errors import DataLoss, TandemError
from tandem.prefix_usage import PrefixHit

log = logging.getLogger(__name__)
FIND_S = 0.25
RESTORE_S = 2.0  # what is not here by then is computed
AT_ONCE = 8  # pieces of one prompt on their way

Piece = KvHandle | PieceElsewhere


@dataclass(frozen=True, slots=True)
class Wanted:
    """For whom pieces are fetched, and what becomes of them."""

    tenant: str
    holder: str
    place: Callable[[int, ChunkHeader, memoryview], Awaitable[None]]  # a verified chunk of the nth piece
    is_wanted: Callable[[], bool]  # whether somebody waits for more


class PrefixReader:
    """One worker's way to the pieces in its store, and in those `elsewhere`."""

    def __init__(self, client: KvClient, pieces: Pieces, elsewhere: Elsewhere | None = None) -> None:
        self.form = pieces.form
        self.report = pieces.report
        self._client = client
        self._pieces = pieces
        self._elsewhere = elsewhere

    def may_help(self, num_tokens: int) -> bool:
        """Whether a prompt of that many tokens is long enough: its last one is always computed."""
        return num_tokens > self.form.tokens

    async def find(self, tenant: str, token_ids: Sequence[int]) -> list[Piece]:
        """The longest cached beginning of these tokens, piece by piece."""
        self.report.num_prompts += 1
        try:
            async with asyncio.timeout(FIND_S):
                names, handles = await self._pieces.look_up(tenant, token_ids)
        except (TandemError, TimeoutError) as error:
            self.note("find", error)
            return []
        if self._elsewhere is None or len(handles) == len(names):
            return [*handles]
        return [*handles, *await self._elsewhere.find(tenant, names[len(handles) :])]

    async def fetch(self, pieces: Sequence[Piece], wanted: Wanted) -> int:
        """How many pieces are in place, from the first on. A piece counts when all of it was checked; until
        then its blocks are as good as empty."""
        is_here = [False] * len(pieces)
        some = asyncio.Semaphore(AT_ONCE)

        async def fetch(number: int, piece: Piece) -> None:
            async with some:
                if wanted.is_wanted():
                    is_here[number] = await self._fetch_piece(number, piece, wanted)

        try:
            async with asyncio.timeout(RESTORE_S), asyncio.TaskGroup() as group:
                for number, piece in enumerate(pieces):
                    group.create_task(fetch(number, piece))
        except* (TandemError, TimeoutError) as errors:
            self.note("restore", errors.exceptions[0])
        return [*is_here, False].index(False)

    def count(self, num_pieces: int, num_prompt_tokens: int, began_s: float, token_s: float) -> PrefixHit:
        """What these pieces brought a prompt, added to the report. They were fetched since `began_s`, and a
        token that is not computed saves `token_s`."""
        form, report, restore_s = self.form, self.report, time.monotonic() - began_s
        num_tokens, num_bytes = num_pieces * form.tokens, num_pieces * form.num_bytes
        saved_s = num_tokens * token_s - restore_s
        report.num_hits += num_pieces > 0
        report.num_tokens += num_tokens
        report.num_bytes += num_bytes
        report.restore_s += restore_s
        report.saved_s += saved_s
        return PrefixHit(min(num_tokens, num_prompt_tokens), num_bytes, saved_s)

    def note(self, what: str, error: Exception) -> None:
        """Something did not work, and does not matter."""
        self.report.num_failures += 1
        log.info("could not %s a prefix: %s", what, getattr(error, "reason", type(error).__name__))

    async def close(self) -> None:
        if self._elsewhere is not None:
            await self._elsewhere.close()

    async def _fetch_piece(self, number: int, piece: Piece, wanted: Wanted) -> bool:
        """False if it is damaged, or a store that the index named could not give it: no reason to give up
        others."""
        if self._elsewhere is None or isinstance(piece, KvHandle):
            return await self._read_own(cast(KvHandle, piece), number, wanted)
        try:
            await self._read(self._elsewhere.store(piece), piece.handle, number, wanted)
        except TandemError as error:
            self._elsewhere.note_missing(piece, error)
            return False
        self.report.num_elsewhere += 1
        return True

    async def _read_own(self, handle: KvHandle, number: int, wanted: Wanted) -> bool:
        """A piece that is damaged is given up: it would fail everybody who asks for it."""
        try:
            await self._read(self._client, handle, number, wanted)
        except DataLoss as error:
            self.note("restore", error)
            with suppress(TandemError):
                await self._client.release(handle)
            return False
        return True

    async def _read(self, store: KvClient, handle: KvHandle, number: int, wanted: Wanted) -> None:
        async with aclosing(store.get(handle, wanted.holder, tenant=wanted.tenant)) as chunks:
            async for chunk, payload in chunks:
                await wanted.place(number, chunk, payload)
