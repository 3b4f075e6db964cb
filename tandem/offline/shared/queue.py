"""A queue in Redis that many runners work on, on several machines.

`v1:queue:{NAME}:…`, the braces for Redis Cluster:

    job       hash     what was asked for: model, input, number of lines; whether it has ended, and how
    offered   bitmap   lines that were put into `lines`, by number
    lines     stream   what is to be done: entries, each with one runner of the group at a time
    done      bitmap   lines that have their record
    records   stream   records that the owner has not put into its files yet
    dead      stream   lines that failed, the last ten thousand or so
    beat:R    string   runner R lives; its entries are others' when this is gone

A line is done when its bit is set, which happens with its record and once (`scripts.FINISH`), only for the
runner that holds the line. Every key has a time to live, which every heartbeat renews. All calls block, and
raise what redis-py raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from tandem.errors import ConfigError
from tandem.offline.lines import Entry
from tandem.offline.shared import scripts
from tandem.redis_url import SAFE_POLICIES, redacted, redis_client

if TYPE_CHECKING:
    pass

GROUP = "runners"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
TIMEOUT_S = 5.0
BLOCK_MS = 1000
TTL_S = 7 * 86400  # of everything, from the last heartbeat of any runner or owner
LEASE_S = 5.0  # a runner that has said nothing for so long is dead
ENDED_S = 86400  # how long a queue that has ended can be looked at


class EndedError(Exception):
    """There are no lines any more: the queue has ended, or Redis has lost it."""


class Held(NamedTuple):
    """A line that one runner holds."""

    id: str  # in the stream
    entry: Entry
    deliveries: int  # runners that were given it, this one included


class SharedRecord(NamedTuple):
    """A record on its way to the owner's files."""

    id: str
    line: int
    is_failure: bool
    members: dict[str, Any]


class SharedQueue:
    """One queue by its name. Thread-safe; connects when first used."""

    def __init__(self, url: str, name: str, lease_s: float = LEASE_S) -> None:
        """Raises `ConfigError` for a URL or a name that cannot be one."""
        if not NAME.fullmatch(name):
            raise ConfigError(f"--name {name[:64]!r} must be 1 to 64 of A-Z a-z 0-9 . _ -")
        self.name = name
        self.lease_s = lease_s
        self._url = url
        self._redis: Any = redis_client(url, TIMEOUT_S)
        self._scripts = {
            name: self._redis.register_script(getattr(scripts, name))
            for name in ("OPEN", "OFFER", "FINISH", "CLAIM", "REOPEN")
        }

    def check_server(self) -> None:
        """Raise `ConfigError` unless what Redis is told is safe there."""
        import redis

        try:
            policy = self._redis.info("memory").get("maxmemory_policy")
            is_kept = self._redis.info("persistence").get("aof_enabled")
        except (redis.RedisError, OSError) as error:
            where = redacted(self._url)
            raise ConfigError(f"cannot use Redis at {where}: {type(error).__name__}: {error}") from error
        if policy not in SAFE_POLICIES:
            raise ConfigError(f"Redis may evict the queue: set maxmemory-policy to noeviction, not {policy}")
        if not is_kept:
            raise ConfigError("Redis would lose the queue when it ends: set appendonly to yes")

    def open(self, owner: str, facts: dict[str, str]) -> None:
        """Begin the queue, or go on with it. Raises `ConfigError` if it is another owner's."""
        values = [item for pair in {"owner": owner, **facts}.items() for item in pair]
        if _text(self._run("OPEN", ("job", "lines"), GROUP, *values)) != owner:
            raise ConfigError(
                f"there is a queue {self.name} in this Redis already: join it with "
                f"`tandem queue work --name {self.name}`, or give another --name"
            )

    def job(self) -> dict[str, str]:
        """What the queue was begun with; empty if there is none."""
        found = self._redis.hgetall(self._key("job"))
        return {_text(name): _text(value) for name, value in found.items()}

    def counts(self) -> dict[str, int]:
        """Lines that have records and those that failed, but for bad lines, which never came here."""
        completed, failed = self._redis.hmget(self._key("job"), "completed", "failed")
        if completed is None:
            completed = int(self._redis.bitcount(self._key("done"))) - int(failed or 0)
        return {"completed": int(completed), "failed": int(failed or 0)}

    def end(self, how: str) -> None:
        """Nothing more is to be done: `finished` or `cancelled`. What runners hold is nobody's."""
        values: dict[Any, Any] = {"ended": how, **self.counts()}
        pipeline = self._redis.pipeline()
        pipeline.hset(self._key("job"), mapping=values)
        pipeline.expire(self._key("job"), ENDED_S)
        if how == "finished":
            pipeline.unlink(*(self._key(part) for part in ("offered", "lines", "done", "records")))
        pipeline.execute()

    def beat(self, runner: str) -> None:
        """The runner lives, and so does the queue."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(self._key(f"beat:{runner}"), "1", px=int(1000 * self.lease_s))
        for part in ("job", "offered", "lines", "done", "records", "dead"):
            pipeline.expire(self._key(part), TTL_S)
        pipeline.execute()

    def leave(self, runner: str) -> None:
        """What the runner still holds is others' at once."""
        self._redis.unlink(self._key(f"beat:{runner}"))

    # --- of the owner ---

    def num_open(self) -> int:
        """Lines that were offered and are not done."""
        return int(self._redis.xlen(self._key("lines")))

    def num_held(self) -> int:
        """Lines that runners have now."""
        return int(self._redis.xpending(self._key("lines"), GROUP)["pending"])

    def offer(self, entries: Iterable[Entry]) -> None:
        pairs = [item for entry in entries for item in (entry.line, json.dumps(asdict(entry)))]
        self._run("OFFER", ("offered", "lines"), *pairs)

    def done_bits(self) -> bytes:
        """One bit a line, the highest of the first byte for line 0."""
        return self._redis.get(self._key("done")) or b""

    def reopen(self, lines: Sequence[int]) -> None:
        if lines:
            self._run("REOPEN", ("done", "offered"), *lines)

    def records(self, count: int, *, block: bool) -> list[SharedRecord]:
        """The oldest that were not dropped."""
        key = self._key("records")
        found = self._redis.xread({key: "0"}, count=count, block=BLOCK_MS if block else None)
        entries = found[0][1] if found else []
        return [
            SharedRecord(
                _text(id_), int(values[b"line"]), bool(values[b"code"]), json.loads(values[b"record"])
            )
            for id_, values in entries
        ]

    def drop_records(self, ids: Sequence[str]) -> None:
        """They are in the owner's files."""
        self._redis.xdel(self._key("records"), *ids)

    # --- of runners: all raise `EndedError` but `finish` ---

    def take(self, runner: str, count: int) -> list[Held]:
        """Lines for this runner alone, after a second's wait none."""
        found = self._read(runner, count, ">", BLOCK_MS)
        return [Held(id_, entry, 1) for id_, entry in found]

    def held_by(self, runner: str) -> list[Held]:
        """What the runner was given, even if it never heard of it."""
        return [Held(id_, entry, 1) for id_, entry in self._read(runner, 1 << 20, "0", None)]

    def claim_from_dead(self, runner: str, count: int) -> list[Held]:
        """Lines of runners whose heartbeat is gone."""
        taken: list[Held] = []
        with _ending():
            for other in self._redis.xinfo_consumers(self._key("lines"), GROUP):
                name = _text(other["name"])
                if name != runner and len(taken) < count:
                    keys = ("lines", f"beat:{name}")
                    found: Any = self._run("CLAIM", keys, GROUP, runner, name, count - len(taken))
                    taken += [Held(_text(id_), _entry(entry), int(times)) for id_, entry, times in found]
        return taken

    def finish(self, runner: str, held: Held, code: str, members: dict[str, Any]) -> bool:
        """Keep a line's record; `code` says what went wrong, if anything. Whether this was the one."""
        keys = ("done", "lines", "records", "dead", "job")
        line, record = held.entry.line, json.dumps(members)
        with suppress(EndedError), _ending():
            return self._run("FINISH", keys, GROUP, runner, held.id, line, code, record) == 1
        return False

    def _read(self, runner: str, count: int, since: str, block_ms: int | None) -> list[tuple[str, Entry]]:
        streams = {self._key("lines"): since}
        with _ending():
            found = self._redis.xreadgroup(GROUP, runner, streams, count=count, block=block_ms)
        entries = found[0][1] if found else []
        return [(_text(id_), _entry(values[b"entry"])) for id_, values in entries if values]

    def _run(self, script: str, keys: Sequence[str], *arguments: str | int) -> object:
        found: object = self._scripts[script](keys=[self._key(part) for part in keys], args=arguments)
        return found

    def _key(self, part: str) -> str:
        return f"v1:queue:{{{self.name}}}:{part}"


@contextmanager
def _ending() -> Iterator[None]:
    """What Redis says when the stream is gone becomes `EndedError`."""
    import redis

    try:
        yield
    except redis.ResponseError as error:
        if not any(word in str(error) for word in ("NOGROUP", "UNBLOCKED", "no such key")):
            raise
        raise EndedError from error


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _entry(data: bytes) -> Entry:
    return Entry(**json.loads(data))
