"""Two backends as one: a small fast one over a large slow one.

    memory://?bytes=268435456+disk:///var/tmp/kv

An object lies in one of them. It is written to the fast one; when that has no room, the objects that were
used least recently move down, whole. An object that is read a second time from below moves up again:
most are read once, and moving those would cost more than it saves. Nothing is ever dropped here, so it
does not matter who reads what: what may go is the store's business. More than two tiers are pairs of
pairs.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import parse_qsl, urlencode, urlsplit

from kvstore.backend import Backend, Location, Mappable
from kvstore.key import ObjectKey
from tandem.errors import ConfigError, TandemError

_BORDER = re.compile(r"\+(?=[a-z]+://)")


class TieredBackend:
    """`upper` keeps up to `upper_bytes` of messages, `lower` the rest."""

    def __init__(self, upper: Backend, upper_bytes: int, lower: Backend) -> None:
        self.is_blocking = upper.is_blocking or lower.is_blocking
        self.num_demoted = self.num_promoted = 0
        self._upper = upper
        self._upper_bytes = upper_bytes
        self._lower = lower
        self._sizes: OrderedDict[ObjectKey, list[int]] = OrderedDict()  # above; least recently used first
        self._below: dict[ObjectKey, list[int]] = {}
        self._read_below: set[ObjectKey] = set()
        self._used_bytes = 0  # above

    def put(self, key: ObjectKey, index: int, message: bytes) -> None:
        if key not in self._below and not self._has_room(key, len(message)):
            self._demote(key)
        if key in self._below:
            self._lower.put(key, index, message)
            self._below[key].append(len(message))
        else:
            self._upper.put(key, index, message)
            self._sizes.setdefault(key, []).append(len(message))
            self._sizes.move_to_end(key)
            self._used_bytes += len(message)

    def get(self, key: ObjectKey, index: int) -> bytes:
        if key in self._below and index == 0:
            self._note_reading(key)
        if key in self._below:
            return self._lower.get(key, index)
        self._sizes.move_to_end(key)
        return self._upper.get(key, index)

    def delete(self, key: ObjectKey) -> None:
        self._upper.delete(key)
        self._lower.delete(key)
        self._used_bytes -= sum(self._sizes.pop(key, ()))
        self._below.pop(key, None)
        self._read_below.discard(key)

    def close(self) -> None:
        self._upper.close()
        self._lower.close()

    def _has_room(self, key: ObjectKey, num_bytes: int) -> bool:
        """Whether the object may grow above; others move down for it, unless it is too large anyway."""
        if sum(self._sizes.get(key, ())) + num_bytes > self._upper_bytes:
            return False
        while self._used_bytes + num_bytes > self._upper_bytes:
            self._demote(next(other for other in self._sizes if other != key))
        return True

    def _demote(self, key: ObjectKey) -> None:
        """Move down what there is of the object; it stays above if that fails."""
        sizes = self._sizes.get(key, [])
        _copy(key, len(sizes), self._upper, self._lower)
        self._upper.delete(key)
        self._used_bytes -= sum(sizes)
        self._sizes.pop(key, None)
        self._below[key] = sizes
        self.num_demoted += 1

    def _note_reading(self, key: ObjectKey) -> None:
        if key in self._read_below:
            self._promote(key)
        else:
            self._read_below.add(key)

    def _promote(self, key: ObjectKey) -> None:
        """Move up, if the object fits and the tiers let it; it can be read below as well."""
        sizes = self._below[key]
        try:
            if not self._has_room(key, sum(sizes)):
                return
            _copy(key, len(sizes), self._lower, self._upper)
        except TandemError:
            return
        self._lower.delete(key)
        del self._below[key]
        self._read_below.discard(key)
        self._sizes[key] = sizes
        self._used_bytes += sum(sizes)
        self.num_promoted += 1


class MappableTiers(TieredBackend):
    """Over an upper tier whose objects can be mapped."""

    def locate(self, key: ObjectKey) -> Location | None:
        """Where the upper tier has the object, which moves there if it can."""
        if key in self._below:
            self._promote(key)
        if key in self._below or not isinstance(self._upper, Mappable):
            return None
        self._sizes.move_to_end(key)
        return self._upper.locate(key)


def _copy(key: ObjectKey, num_messages: int, source: Backend, target: Backend) -> None:
    """All or nothing."""
    try:
        for index in range(num_messages):
            target.put(key, index, source.get(key, index))
    except BaseException:
        target.delete(key)
        raise


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
        kind = MappableTiers if isinstance(upper, Mappable) else TieredBackend
        return kind(upper, upper_bytes, open_tiers(urls[1:], open_one))
    except BaseException:
        upper.close()
        raise


def _without_bytes(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    text = options.pop("bytes", "")
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(
            f"a {parts.scheme}:// tier over another one needs its size, ?bytes=268435456 for one"
        )
    return parts._replace(query=urlencode(options)).geturl(), int(text)
