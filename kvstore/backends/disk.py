"""`disk:///PATH`: one file per object below PATH."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvstore.files import FileBackend
from tandem.errors import ConfigError
from tandem.redis_url import options_of


def open_backend(url: str) -> FileBackend:
    parts = urlsplit(url)
    options_of(parts)
    if parts.netloc or not parts.path.strip("/"):
        raise ConfigError(f"disk:// needs an absolute path, disk:///var/tmp/kv for one, not {url!r}")
    return FileBackend(Path(unquote(parts.path)), is_blocking=True)
