"""The prefix index that several stores share, in Redis or Valkey: which store holds which piece.

It is a hint and nothing more. Stores say what they hold, workers look for what their own store lacks, and the
store that is named is the authority: what it does not have is a miss. So the index may be empty, old, slow or
gone, and nothing waits for it longer than `BUDGET_S`.

One thread has the connection. Whoever stops waiting for an answer leaves the thread to hear it, so no
command ever reads the answer to an earlier one. Of Redis's commands it needs GETRANGE SET EXISTS EVAL INFO,
and UNLINK inside EVAL, on keys `v1:*`. Every key has a time to live.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvstore.breaker import Breaker
from kvstore.index_entry import MAX_ENTRY_BYTES, BadEntry, EntryForm, Place
from tandem.config_index import IndexConfig
from tandem.errors import ConfigError
from tandem.prefix_usage import IndexReport
from tandem.redis_url import check_policy, redacted, redis_client

if TYPE_CHECKING:
    import redis

log = logging.getLogger(__name__)

BUDGET_S = 0.25  # of one command, and so of a look-up
TTL_S = 60.0  # of an entry that its store does not write again
MAX_BATCH = 512  # entries in one command
REMOVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('UNLINK', KEYS[1]) end return 0"

Batch = Sequence[tuple[str, bytes]]
T = TypeVar("T")


class IndexDown(Exception):
    """It did not answer in time, or is not asked just now."""


class PrefixIndex:
    """One process's connection. Lives on the event loop; `close` it."""

    def __init__(self, config: IndexConfig, report: IndexReport | None = None) -> None:
        self.report = report or IndexReport()
        self.form = EntryForm.of(config)
        self._config = config
        self._breaker = Breaker()
        self._redis: Any = redis_client(config.url, BUDGET_S)
        self._is_checked = False  # whether this server may be used; its thread only
        self._thread = ThreadPoolExecutor(1, "prefix-index")

    @property
    def is_up(self) -> bool:
        """Whether it is asked: not after three failures in a row, but for a try now and then."""
        return not self._breaker.is_open

    async def check(self) -> None:
        """Look at the server when a store starts. One that would evict, or is required and does not answer,
        raises `ConfigError`; without any other the store starts all the same."""
        try:
            await self._do(lambda client: None)
        except IndexDown as error:
            where = redacted(self._config.url)
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            if self._config.required:
                raise ConfigError(f"the prefix index at {where} does not answer, and is required") from error
            log.warning("the prefix index at %s does not answer: other stores are not asked", where)

    async def find(self, names: Sequence[str]) -> dict[str, tuple[Place, bytes]]:
        """Places by name, with the value that says so, up to the first name without one. Raises
        `IndexDown`."""
        found: dict[str, tuple[Place, bytes]] = {}
        names = names[:MAX_BATCH]
        for name, value in zip(names, await self._do(partial(_values, names)), strict=True):
            if value == b"":
                break
            try:
                found[name] = self.form.unpack(name, value)
            except BadEntry:
                self.report.num_refused += 1
                log.error("the prefix index holds an entry that none of our stores wrote; it is ignored")
                break
        return found

    async def put(self, entries: Mapping[str, bytes], ttl_s: float = TTL_S) -> None:
        """Write entries, or the same again. Raises `IndexDown`."""
        for batch in _batches(entries):
            await self._do(partial(_set, batch, ttl_s))

    async def remove(self, entries: Mapping[str, bytes]) -> None:
        """Remove entries that are still as given. Raises `IndexDown`."""
        for batch in _batches(entries):
            await self._do(partial(_remove, batch))

    async def has(self, name: str) -> bool:
        """Whether there is such a key. Raises `IndexDown`."""
        return bool(await self._do(lambda client: client.exists(name)))

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        self._redis.close()

    async def _do(self, command: Callable[[Any], T]) -> T:
        """The command's answer within the budget."""
        if not self._breaker.lets_through():
            raise IndexDown
        import redis

        asked = asyncio.wrap_future(self._thread.submit(self._ask, command))
        try:
            async with asyncio.timeout(BUDGET_S):
                answer = await asked
        except (redis.RedisError, OSError, ConfigError) as error:  # a TimeoutError is an OSError
            self._breaker.note(is_good=False)
            self.report.num_failures += 1
            raise IndexDown from error
        self._breaker.note(is_good=True)
        return answer

    def _ask(self, command: Callable[[redis.Redis], T]) -> T:
        """On the thread. A server that answers again may be another one, and is looked at first."""
        try:
            if not self._is_checked:
                check_policy(self._redis, self._config.url)
                self._is_checked = True
            return command(self._redis)
        except BaseException:
            self._is_checked = False
            raise


def _batches(entries: Mapping[str, bytes]) -> Iterator[Batch]:
    """In pieces that one command may write."""
    items = list(entries.items())
    return (items[first : first + MAX_BATCH] for first in range(0, len(items), MAX_BATCH))


def _values(names: Sequence[str], client: Any) -> list[object]:
    """No more of each than an entry may have and a byte; `b""` where there is none, an error where there is
    another kind of thing."""
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.getrange(name, 0, MAX_ENTRY_BYTES)
    answers = list(pipeline.execute(raise_on_error=False))
    for answer in answers:
        if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
            raise answer
    return answers


def _set(entries: Batch, ttl_s: float, client: Any) -> None:
    pipeline = client.pipeline(transaction=False)
    for name, value in entries:
        pipeline.set(name, value, px=int(1000 * ttl_s))
    pipeline.execute()


def _remove(entries: Batch, client: Any) -> None:
    pipeline = client.pipeline(transaction=False)
    for name, value in entries:
        pipeline.eval(REMOVE, 1, name, value)
    pipeline.execute()
