"""Where messages are kept. A backend is one file in kvstore/backends with a function `open_backend(url)`.

It keeps bytes under a key and an index and decides nothing: when bytes may come and go is the
store's business (kvstore/store.py).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Protocol, cast
from urllib.parse import urlsplit

from kvstore import backends
from kvstore.key import ObjectKey
from tandem.errors import ConfigError


class Backend(Protocol):
    """Messages of objects, in order of their index."""

    def put(self, key: ObjectKey, index: int, message: bytes) -> None:
        """Keep a message; indices of a key come in order, from 0."""

    def get(self, key: ObjectKey, index: int) -> bytes:
        """The message as it was put."""

    def delete(self, key: ObjectKey) -> None:
        """Forget all messages of a key; one without messages is fine."""

    def close(self) -> None:
        """Give everything back."""


def known_schemes() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(backends.__path__))


def backend_from_url(url: str) -> Backend:
    """Open the backend that the URL's scheme names, `memory://` for one."""
    scheme = urlsplit(url).scheme
    known = known_schemes()
    if scheme not in known:
        names = ", ".join(f"{name}://" for name in known)
        raise ConfigError(f"no KV backend for {url!r}; known: {names}")
    return cast(Backend, import_module(f"kvstore.backends.{scheme}").open_backend(url))
