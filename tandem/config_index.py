"""Settings of the prefix index that several stores share. Part of `tandem.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tandem.config_values import check


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """Where stores tell each other which beginnings of prompts they hold."""

    url: str = field(default="", repr=False)  # redis:// or rediss://, may hold a password; empty: no index
    key_file: Path | None = None  # a secret of at least 32 bytes, the same for all stores and their workers
    required: bool = False  # True: do not start without it; False: start, and use own prefixes only

    def __post_init__(self) -> None:
        is_redis = self.url.startswith(("redis://", "rediss://"))
        check(not self.url or is_redis, "kvstore index.url must begin with redis:// or rediss://")
        check(
            not self.url or self.key_file is not None,
            "kvstore index needs index.key_file, one secret for all stores; openssl rand -hex 32 makes one",
        )
