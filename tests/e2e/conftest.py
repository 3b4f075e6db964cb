"""The clusters that tests share. A test that breaks something starts its own."""

from __future__ import annotations

import pytest_asyncio

from tests.e2e.harness import running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    """One prefill and one decode worker with room for everything."""
    async with running() as started:
        yield started
