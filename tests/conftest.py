"""Settings all tests share."""

from __future__ import annotations

import gc
import os

from hypothesis import settings

# Two compute threads beside busy neighbours run many times slower than one: they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines that run tests are shared: how long one example takes says nothing.
settings.register_profile("tandem", deadline=None)
settings.load_profile("tandem")


def pytest_collection_finish() -> None:
    """A walk of the garbage collector over all that the tests have imported would stop a service that runs in
    this process for a second, which is longer than many a limit."""
    gc.collect()
    gc.freeze()
