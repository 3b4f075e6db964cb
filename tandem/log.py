"""Logging set up once per process: to standard error, with the process's role and never a prompt."""

from __future__ import annotations

import logging
import sys


def set_up(role: str, level: str = "INFO") -> None:
    """Send log lines of this process to standard error, marked with its role."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level,
        format=f"%(asctime)s {role:<8} %(levelname)-7s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
