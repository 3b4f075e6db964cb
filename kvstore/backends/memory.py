"""Messages in this process's memory. A message is kept as it came; nothing is copied."""

from __future__ import annotations

from urllib.parse import urlsplit

from kvstore.backend import options_of
from kvstore.key import ObjectKey


class MemoryBackend:
    """A list of messages per key."""

    is_blocking = False

    def __init__(self) -> None:
        self._messages: dict[ObjectKey, list[bytes]] = {}

    def put(self, key: ObjectKey, index: int, message: bytes) -> None:
        messages = self._messages.setdefault(key, [])
        assert index == len(messages), (index, len(messages))
        messages.append(message)

    def get(self, key: ObjectKey, index: int) -> bytes:
        return self._messages[key][index]

    def delete(self, key: ObjectKey) -> None:
        self._messages.pop(key, None)

    def close(self) -> None:
        self._messages.clear()


def open_backend(url: str) -> MemoryBackend:
    options_of(urlsplit(url))
    return MemoryBackend()
