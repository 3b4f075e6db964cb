"""Where messages are kept. A backend is one file in kvstore/backends with a function `open_backend(url)`
(kvstore/urls.py finds it).

It keeps bytes under a key and an index and decides nothing: when bytes may come and go is the
store's business (kvstore/store.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol, runtime_checkable

from kvstore.key import ObjectKey


class Backend(Protocol):
    """Messages of objects, in order of their index.

    `put` and `get` raise NO_MEMORY_FIT_NOW, STORE_DOWN or STALE_HANDLE where the medium is full, gone, or
    has lost the object.
    """

    is_blocking: bool  # operations wait for a disk or a peer: the store runs in a thread of its own

    def put(self, key: ObjectKey, index: int, message: bytes) -> None:
        """Keep a message; indices of a key come in order, from 0."""

    def get(self, key: ObjectKey, index: int) -> bytes:
        """The message as it was put."""

    def delete(self, key: ObjectKey) -> None:
        """Forget all messages of a key; one without messages is fine. Never raises."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where the messages of an object lie one behind the other in a file of this host."""

    path: str
    ends: tuple[int, ...]  # byte offsets behind each message; the first starts at 0
    is_reused: bool = False  # other objects will lie in the file later


@runtime_checkable
class Mappable(Backend, Protocol):
    """A backend whose objects a process on the same host can map."""

    def locate(self, key: ObjectKey) -> Location | None:
        """Where the object is, as long as it is not deleted; a mapping made before stays good after. None if
        this one cannot be mapped."""


@runtime_checkable
class Reserving(Protocol):
    """A backend that knows before the first message whether an object will fit."""

    def place(self, key: ObjectKey, num_bytes: int) -> None:
        """Make room for a new object, or raise NO_MEMORY_FIT_NOW."""


@runtime_checkable
class Placeable(Mappable, Reserving, Protocol):
    """A backend in whose files a writer on the same host may put an object's messages by itself."""

    def path(self, key: ObjectKey) -> Path | None:
        """The object's file; None if this one has none."""

    def placed(self, key: ObjectKey, end: int) -> memoryview:
        """What lies in the file behind the messages that were kept, up to that byte."""

    def accept(self, key: ObjectKey, num_bytes: int) -> None:
        """Keep that many bytes of it as the next message."""

    def recycle(self, key: ObjectKey) -> None:
        """As `delete`, and other objects may lie in that memory: nobody looks at it any more."""


class Use(Enum):
    """Who may look at an object's file."""

    NONE = "none"  # nobody: other objects may lie there
    NOW = "now"  # a writer or a reader, so it stays where it is
    LOST = "lost"  # somebody who did not say that they are done: no other object gets it


@runtime_checkable
class Moving(Protocol):
    """A backend that takes an object out of its file to make room for others."""

    def watch(self, use_of: Callable[[ObjectKey], Use]) -> None:
        """Ask there who may look at the file before it is taken."""
