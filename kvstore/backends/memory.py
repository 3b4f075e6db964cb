"""Messages in this process's memory. A message is kept as it came; nothing is copied."""

from __future__ import annotations

import mmap
from urllib.parse import urlsplit

from kvstore.key import ObjectKey
from tandem.errors import Overloaded
from tandem.redis_url import options_of

HEADROOM_BYTES = 64 << 20  # for messages on their way in and everything else of this process


class MemoryBackend:
    """A list of messages per key."""

    is_blocking = False

    def __init__(self) -> None:
        self._messages: dict[ObjectKey, list[bytes]] = {}
        self._promised: dict[ObjectKey, int] = {}  # bytes that were placed and have not come
        self._num_promised = 0

    def place(self, key: ObjectKey, num_bytes: int) -> None:
        """NO_MEMORY_FIT_NOW if this process could not get what it has promised: an allocation that fails
        later, inside gRPC, would end it."""
        try:
            mmap.mmap(-1, self._num_promised + num_bytes + HEADROOM_BYTES).close()
        except OSError as error:
            raise Overloaded("NO_MEMORY_FIT_NOW", "the store's host has no memory for it") from error
        self._promise(key, num_bytes)

    def put(self, key: ObjectKey, index: int, message: bytes) -> None:
        messages = self._messages.setdefault(key, [])
        assert index == len(messages), (index, len(messages))
        messages.append(message)
        self._promise(key, -len(message))

    def get(self, key: ObjectKey, index: int) -> bytes:
        return self._messages[key][index]

    def delete(self, key: ObjectKey) -> None:
        self._messages.pop(key, None)
        self._num_promised -= self._promised.pop(key, 0)

    def close(self) -> None:
        self._messages.clear()
        self._promised.clear()
        self._num_promised = 0

    def _promise(self, key: ObjectKey, num_bytes: int) -> None:
        before = self._promised.get(key, 0)
        self._promised[key] = max(0, before + num_bytes)
        self._num_promised += self._promised[key] - before


def open_backend(url: str) -> MemoryBackend:
    options_of(urlsplit(url))
    return MemoryBackend()
