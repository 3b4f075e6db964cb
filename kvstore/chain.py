"""Names of a prompt's beginnings by content: one per piece of so many tokens.

A name is a keyed hash (BLAKE2b) over the name of the piece before and the piece's token ids; the first
piece has the model fingerprint before it, and the key is the tenant's salt. So a name stands for all
tokens up to its end, KV of another build is never found, and what one tenant cached is neither found nor
recognised by another.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from kvstore.key import OBJECT_ID_BYTES


def piece_names(token_ids: Sequence[int], piece_tokens: int, fingerprint: bytes, salt: bytes) -> list[bytes]:
    """Object ids of the whole pieces of a prompt, first piece first."""
    names, parent = [], fingerprint
    for end in range(piece_tokens, len(token_ids) + 1, piece_tokens):
        ids = struct.pack(f"<{piece_tokens}I", *token_ids[end - piece_tokens : end])
        parent = hashlib.blake2b(parent + ids, key=salt, digest_size=32).digest()
        names.append(parent[:OBJECT_ID_BYTES])
    return names
