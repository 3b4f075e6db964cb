"""Every backend, opened anew for a test, and what each still keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore.backend import Backend
from kvstore.files import PREFIX
from kvstore.urls import backend_from_url
from tests import redis_server

SCHEMES = ("memory", "disk", "shm", pytest.param("redis", marks=pytest.mark.redis))


@dataclass(frozen=True)
class Medium:
    """A place for KV: its URL, and what lies in it, looked at past the backend."""

    url: str
    contents: Callable[[Backend], list[str]]

    def open(self) -> Backend:
        return backend_from_url(self.url)


@contextmanager
def medium(scheme: str, folder: Path) -> Iterator[Medium]:
    if scheme == "redis":
        with redis_server.running(folder) as server:
            yield Medium(server.url, lambda _: [key.decode() for key in server.key_names()])
    elif scheme == "disk":
        yield Medium(f"disk://{folder}", _files)
    elif scheme == "shm":
        yield Medium("shm://", _files)
    else:
        yield Medium("memory://", lambda backend: [repr(key) for key in backend._messages])


def _files(backend: Backend) -> list[str]:
    folder = backend._folder
    assert folder.name.startswith(PREFIX)
    idle = {".lock", *(path.name for path in getattr(backend, "_free", ()))}
    return [path.name for path in folder.glob("*") if path.name not in idle] if folder.exists() else []
