"""Levels of logging, as people write them."""

from __future__ import annotations

import pytest

from tandem.errors import ConfigError
from tandem.log import known_level


def test_levels_are_known_however_they_are_written() -> None:
    assert [known_level(level) for level in ("info", "WARNING", "Debug")] == ["INFO", "WARNING", "DEBUG"]
    with pytest.raises(ConfigError, match="must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL, not loud"):
        known_level("loud")
