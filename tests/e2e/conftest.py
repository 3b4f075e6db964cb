"""The clusters that tests share. A test that breaks something starts its own."""

from __future__ import annotations

import pytest
import pytest_asyncio

from decode_worker import publisher
from kvstore import prefix_reader
from tests.e2e.harness import running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    """One prefill and one decode worker with room for everything."""
    async with running() as started:
        yield started


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """What is cached is used however long a busy machine takes: tests count it."""
    for module, name in (publisher, "PUBLISH_S"), (prefix_reader, "FIND_S"), (prefix_reader, "RESTORE_S"):
        monkeypatch.setattr(module, name, 20.0)
