"""`--profile`: where workers write their profiles, and what is shown of them when the service has ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tandem.config import ClusterConfig, ProfileConfig


def with_profile(config: ClusterConfig, folder: Path | None, steps: int) -> ClusterConfig:
    """The settings with what the command line says of profiles. Raises `ConfigError`."""
    if folder is None:
        return config
    return replace(config, profile=ProfileConfig(dir=folder.resolve(), steps=steps))


def summaries(folder: Path, since_s: float) -> Iterator[str]:
    """The texts that workers wrote since then (seconds since the epoch), by name."""
    for path in sorted(folder.glob("*.txt")):
        if path.stat().st_mtime >= since_s:
            yield path.read_text()
