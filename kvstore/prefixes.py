"""Which prefixes a store holds, and under which salt their names are made."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence

from kvstore.books import Books
from kvstore.key import KvHandle, ObjectKey
from kvstore.objects import StoreCounters
from kvstore.prefix_journal import PrefixJournal


class Prefixes:
    """Finds them in the books of one life of the store."""

    def __init__(self, books: Books, counters: StoreCounters, store_epoch: int) -> None:
        self._books = books
        self._counters = counters
        self._store_epoch = store_epoch
        self._secret = secrets.token_bytes(32)

    def share(self, names_secret: bytes) -> PrefixJournal:
        """Name pieces as every store with that secret does, and write down from now on which there are."""
        self._secret = names_secret
        self._books.journal = journal = PrefixJournal()
        return journal

    def find(self, object_ids: Sequence[bytes], fingerprint: bytes, tenant: str) -> list[KvHandle]:
        """Handles of the prefixes that are readable, up to the first that is not."""
        found = []
        for object_id in object_ids:
            obj = self._books.objects.get(ObjectKey(object_id, 0))
            if obj is None or not obj.is_prefix_of(fingerprint, tenant):
                break
            found.append(obj.header.handle(self._store_epoch))
        self._counters.prefix_hits += len(found)
        self._counters.prefix_misses += len(object_ids) - len(found)
        return found

    def salt(self, tenant: str) -> bytes:
        """What names a tenant's prefixes in this life of the store; empty if it keeps none."""
        if not self._books.prefix_ledger.total:
            return b""
        return hmac.digest(self._secret, tenant.encode(), "sha256")
