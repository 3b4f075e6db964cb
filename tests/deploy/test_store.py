"""Where a service keeps KV that was not told."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.store import EmbeddedStore, chosen_url
from kvstore.backends import shm
from kvstore.backends.memory import MemoryBackend
from tandem.config import CacheConfig, ClusterConfig, KvStoreConfig

TOO_MUCH = 1 << 60


@pytest.mark.parametrize("url", ["memory://", "shm://", "disk:///tmp/kv", "memory://?bytes=9+disk:///tmp/kv"])
def test_what_is_named_is_taken(url):
    assert chosen_url(url, TOO_MUCH) == url


def test_shared_memory_is_taken_where_it_has_room(monkeypatch):
    assert chosen_url("auto", 1 << 20) == "shm://"
    assert chosen_url("auto", TOO_MUCH) == "memory://"
    monkeypatch.setattr(shm, "SHARED_MEMORY", Path("/nowhere"))
    assert chosen_url("auto", 1) == "memory://"


def test_a_store_asks_for_room_for_prompts_and_prefixes(monkeypatch):
    asked = []
    monkeypatch.setattr(shm, "has_room", lambda num_bytes: asked.append(num_bytes))
    store = EmbeddedStore(ClusterConfig(cache=CacheConfig(store_bytes=3 << 20, prefix_bytes=2 << 20)))
    assert KvStoreConfig().url == "auto"
    assert asked == [5 << 20]
    assert isinstance(store._store._backend, MemoryBackend)
    store._store.close()
