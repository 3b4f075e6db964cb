"""What of a sequence is used again: pieces in the store for everybody, blocks in this worker's own pool."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.chain import piece_names
from kvstore.pieces import Pieces
from tandem.prefix_usage import PrefixReport
from tandem.work import Work


class BlockNames:
    """Names of whole blocks by all tokens up to their end (kvstore/chain.py), of each tenant apart. How often
    they were found is added up in `report`."""

    def __init__(self, block_size: int, report: PrefixReport) -> None:
        self._block_size = block_size
        self._report = report
        self._secret = secrets.token_bytes(32)

    def of(self, work: Work, token_ids: Sequence[int]) -> list[bytes]:
        """Of the blocks that these tokens, the request's first ones, fill."""
        salt = hmac.digest(self._secret, work.tenant.encode(), "sha256")
        return piece_names(token_ids, self._block_size, work.fingerprint, salt)

    def note(self, num_shared: int) -> None:
        """So many blocks of a request were here."""
        self._report.num_prompts += 1
        self._report.num_hits += num_shared > 0
        self._report.num_tokens += num_shared * self._block_size


@dataclass(frozen=True, slots=True)
class Reuse:
    """How a decode worker lets later requests begin where earlier ones have been."""

    pieces: Pieces | None = None  # published when a sequence has ended
    names: BlockNames | None = None  # under which its blocks stay in the pool


NOTHING = Reuse()
