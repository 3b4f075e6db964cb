"""Logging set up once per process: to standard error, with the process's role and never a prompt."""

from __future__ import annotations

import logging
import sys

from tandem.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def known_level(level: str) -> str:
    """A level as `logging` spells it. Raises `ConfigError` for a word that is none."""
    if level.upper() not in LEVELS:
        raise ConfigError(f"log level must be one of {', '.join(LEVELS)}, not {level}")
    return level.upper()


def set_up(role: str, level: str = "INFO") -> None:
    """Send log lines of this process to standard error, marked with its role. Raises `ConfigError`."""
    logging.basicConfig(
        stream=sys.stderr,
        level=known_level(level),
        format=f"%(asctime)s {role:<8} %(levelname)-7s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
