"""Who met which beginnings of prompts of late: the router's guess at what decode workers or a store hold.

A prompt is cut into pieces as the store's prefixes are, and each beginning is named by a hash chain over
tenant and tokens. The map is bounded: what was met longest ago is forgotten. It is never told what a worker
has dropped, so that it may name too many; a wrong guess makes a choice a little worse, never a token.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

MAX_BEGINNINGS = 1 << 16
MAX_WORKERS = 4  # remembered of each beginning, the last to meet it
NAME_BYTES = 16


class PrefixMap:
    """Owned by one thread. `piece_tokens` is the length of a piece."""

    def __init__(self, piece_tokens: int, max_beginnings: int = MAX_BEGINNINGS) -> None:
        self._piece_tokens = piece_tokens
        self._max_beginnings = max_beginnings
        self._met: OrderedDict[bytes, list[str]] = OrderedDict()  # worker ids, the last one last

    def __len__(self) -> int:
        return len(self._met)

    def beginnings(self, tenant: str, token_ids: Sequence[int]) -> tuple[bytes, ...]:
        """Names of the prompt's beginnings of one, two, … whole pieces."""
        names, name = [], blake2b(tenant.encode(), digest_size=NAME_BYTES).digest()
        for end in range(self._piece_tokens, len(token_ids) + 1, self._piece_tokens):
            piece = array("I", token_ids[end - self._piece_tokens : end])
            name = blake2b(piece, digest_size=NAME_BYTES, key=name).digest()
            names.append(name)
        return tuple(names)

    def cached_tokens(self, beginnings: Sequence[bytes]) -> dict[str, int]:
        """The longest beginning that each worker has met, in tokens; those that met none are left out."""
        found: dict[str, int] = {}
        for number, name in enumerate(beginnings, 1):
            workers = self._met.get(name)
            if workers is None:  # no longer beginning was met either
                break
            found.update(dict.fromkeys(workers, number * self._piece_tokens))
        return found

    def note(self, beginnings: Sequence[bytes], worker_id: str) -> None:
        """The worker gets a prompt that begins so."""
        for name in reversed(beginnings):  # the shorter one is forgotten later
            others = [other for other in self._met.pop(name, ()) if other != worker_id]
            self._met[name] = [*others, worker_id][-MAX_WORKERS:]
        while len(self._met) > self._max_beginnings:
            self._met.popitem(last=False)
