"""Services of experiments: one that cannot start says why, in a line."""

from __future__ import annotations

import pytest

from bench.embedded import last_words, serving
from tandem.errors import ConfigError

DIED = """starting tandem-8m: router + store, prefill, decode …
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
ModuleNotFoundError: No module named 'x'

error: decode-0 cannot run (exit code 1); its reason is above
"""


def test_of_what_a_service_said_only_the_reason_is_told():
    reason = "ModuleNotFoundError: No module named 'x'; error: decode-0 cannot run (exit code 1)"
    assert last_words(DIED).startswith(reason)
    assert "Traceback" not in last_words(DIED)
    assert last_words("\n") == "it said nothing"


def test_a_service_that_cannot_start_says_why():
    with (
        pytest.raises(
            ConfigError, match=r"the service did not start: error: unknown setting router\.nowhere"
        ),
        serving({"router": {"nowhere": 1}}),
    ):
        raise AssertionError("it started")
