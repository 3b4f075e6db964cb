"""Tiers by their URLs, joined by `+`, the fastest first:

memory://?bytes=268435456+disk:///var/tmp/kv
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qsl, urlencode, urlsplit

from kvstore.backend import Backend, Mappable, Placeable
from kvstore.mapped_tiers import MappableTiers, PlaceableTiers
from kvstore.tiers import TieredBackend
from tandem.errors import ConfigError

_BORDER = re.compile(r"\+(?=[a-z]+://)")


def split_tiers(url: str) -> list[str]:
    """The URLs of the tiers, fastest first."""
    return _BORDER.split(url)


def open_tiers(urls: list[str], open_one: Callable[[str], Backend]) -> Backend:
    """The tiers as one backend. Every tier but the last says how many `bytes` it keeps."""
    if len(urls) == 1:
        return open_one(urls[0])
    url, upper_bytes = _without_bytes(urls[0])
    upper = open_one(url)
    try:
        return _over(upper, upper_bytes, open_tiers(urls[1:], open_one))
    except BaseException:
        upper.close()
        raise


def _over(upper: Backend, upper_bytes: int, lower: Backend) -> TieredBackend:
    """What the upper tier can do with files, both can."""
    if isinstance(upper, Placeable):
        return PlaceableTiers(upper, upper_bytes, lower)
    if isinstance(upper, Mappable):
        return MappableTiers(upper, upper_bytes, lower)
    return TieredBackend(upper, upper_bytes, lower)


def _without_bytes(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    text = options.pop("bytes", "")
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(
            f"a {parts.scheme}:// tier over another one needs its size, ?bytes=268435456 for one"
        )
    return parts._replace(query=urlencode(options)).geturl(), int(text)
