"""Backends by URL: the scheme names a file in kvstore/backends. Tiers are joined by `+`, fastest first:

memory://?bytes=268435456+disk:///var/tmp/kv
"""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from typing import cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from kvstore import backends
from kvstore.backend import Backend, Mappable, Placeable
from kvstore.mapped_tiers import MappableTiers, PlaceableTiers
from kvstore.tiers import TieredBackend
from tandem.errors import ConfigError
from tandem.redis_url import redacted

_BORDER = re.compile(r"\+(?=[a-z]+://)")


def split_tiers(url: str) -> list[str]:
    """The URLs of the tiers, fastest first."""
    return _BORDER.split(url)


def known_schemes() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(backends.__path__))


def backend_from_url(url: str) -> Backend:
    """Open what the URL names: `memory://` for one, or several as tiers, `memory://?bytes=N+disk:///PATH`.

    Raises `ConfigError` for a scheme that there is not, and for a tier over another one without its size.
    """
    return _open_tiers(split_tiers(url))


def _open_tiers(urls: list[str]) -> Backend:
    """The tiers as one backend. Every tier but the last says how many `bytes` it keeps."""
    if len(urls) == 1:
        return _open_one(urls[0])
    url, upper_bytes = _without_bytes(urls[0])
    upper = _open_one(url)
    try:
        return _over(upper, upper_bytes, _open_tiers(urls[1:]))
    except BaseException:
        upper.close()
        raise


def _open_one(url: str) -> Backend:
    """`rediss` is `redis` over TLS."""
    scheme = urlsplit(url).scheme
    module = "redis" if scheme == "rediss" else scheme
    known = known_schemes()
    if module not in known:
        names = ", ".join(f"{name}://" for name in known)
        raise ConfigError(f"no KV backend for {redacted(url)!r}; known: {names}")
    return cast(Backend, import_module(f"kvstore.backends.{module}").open_backend(url))


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
