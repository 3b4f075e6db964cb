"""`redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, or `rediss://` over TLS: Redis or Valkey.

One key per object, a hash of its messages, named `v1:kv:LIFE:OBJECT:EPOCH` with a random LIFE for each
opening. Every key has a time to live, so whatever a killed store left goes by itself. Of Redis's
commands it needs HSET HGET PEXPIRE UNLINK INFO on keys `v1:*`, and nothing else. No command is
repeated: a Redis that does not answer in time is STORE_DOWN to whoever asked, and the next command
connects again. `tandem.redis_url` has the URL's options.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from kvstore.key import ObjectKey
from tandem.errors import ConfigError, FailedPrecondition, Overloaded, Unavailable
from tandem.redis_url import check_policy, redacted, redis_client

if TYPE_CHECKING:
    import redis

TTL_S = 3600.0  # from the last put or get; far more than a lease


class RedisBackend:
    """A hash of messages per object."""

    is_blocking = True

    def __init__(self, client: redis.Redis) -> None:
        self._redis: Any = client
        self._life = secrets.token_hex(8)
        self._lengths: dict[ObjectKey, list[int]] = {}  # of each message

    def put(self, key: ObjectKey, index: int, message: bytes) -> None:
        lengths = self._lengths.setdefault(key, [])
        assert index == len(lengths), (index, len(lengths))
        with redis_errors():
            self._touching(key, "hset", index, message)
        lengths.append(len(message))

    def get(self, key: ObjectKey, index: int) -> bytes:
        with redis_errors():
            message = self._touching(key, "hget", index)
        if not isinstance(message, bytes) or len(message) != self._lengths[key][index]:
            raise FailedPrecondition("STALE_HANDLE", "the store has lost the object")
        return message

    def delete(self, key: ObjectKey) -> None:
        """What cannot be deleted now goes when its time to live is over."""
        if self._lengths.pop(key, None) is not None:
            with suppress(Unavailable, Overloaded), redis_errors():
                self._redis.unlink(self._name(key))

    def close(self) -> None:
        for key in list(self._lengths):
            self.delete(key)
        self._redis.close()

    def _touching(self, key: ObjectKey, command: str, *arguments: object) -> object:
        """The command's answer; its key's time to live starts again."""
        pipeline = self._redis.pipeline(transaction=False)
        getattr(pipeline, command)(self._name(key), *arguments)
        pipeline.pexpire(self._name(key), int(1000 * TTL_S))
        return pipeline.execute()[0]

    def _name(self, key: ObjectKey) -> str:
        return f"v1:kv:{self._life}:{key.object_id.hex()}:{key.epoch}"


@contextmanager
def redis_errors() -> Iterator[None]:
    """What redis-py raises leaves as the store's own errors; its texts may hold anything and are dropped."""
    import redis

    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise Overloaded("NO_MEMORY_FIT_NOW", "the store's medium is full") from error
    except (redis.RedisError, OSError) as error:
        raise Unavailable("STORE_DOWN", "KV store is unavailable") from error


def open_backend(url: str) -> RedisBackend:
    """Connect and look at the server once. Raises `ConfigError` saying what is wrong."""
    client = redis_client(url)
    import redis

    try:
        check_policy(client, url)
    except (redis.RedisError, OSError) as error:
        client.close()
        raise ConfigError(f"cannot use Redis at {redacted(url)}: {type(error).__name__}: {error}") from error
    except ConfigError:
        client.close()
        raise
    return RedisBackend(client)
