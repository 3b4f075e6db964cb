"""Why the store has no room, with the figures."""

from __future__ import annotations

from tandem.errors import InvalidRequest, Overloaded
from tandem.ledger import Ledger


def refuse_full(num_bytes: int, ledger: Ledger, retry_s: float) -> InvalidRequest | Overloaded:
    """NEVER_FITS or NO_MEMORY_FIT_NOW for an object of that many bytes."""
    free, total = ledger.free, ledger.total
    figures = {"needed_bytes": str(num_bytes), "free_bytes": str(free), "total_bytes": str(total)}
    if num_bytes > total:
        message = f"object needs {num_bytes} bytes; the store holds {total}"
        return InvalidRequest("NEVER_FITS", message, metadata=figures)
    message = f"object needs {num_bytes} bytes; the store has {free} of {total} free"
    wait_ms = max(1, int(1000 * retry_s))
    return Overloaded("NO_MEMORY_FIT_NOW", message, retry_after_ms=wait_ms, metadata=figures)
