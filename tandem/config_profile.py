"""Settings of profiles (`tandem.engine.profiler`). Part of `tandem.config`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tandem.config_values import check, check_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """Where each worker writes what its first steps spent their time on. Without a folder none does."""

    dir: Path | None = None
    steps: int = 128  # of each worker, from its first one on; what bounds the files

    def __post_init__(self) -> None:
        check_positive(self, "steps")
        is_folder = self.dir is None or not self.dir.exists() or self.dir.is_dir()
        check(is_folder, f"profiles go to a folder, and {self.dir} is a file")
