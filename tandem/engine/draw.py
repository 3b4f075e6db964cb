"""How one token is drawn: what acts on its distribution, and what its random number depends on."""

from __future__ import annotations

from typing import NamedTuple


class Draw(NamedTuple):
    """Of one row. `temperature` 0 takes the most probable token. The order is that of src/choose.h."""

    seed: int  # as 64 bits without a sign
    position: int
    stream: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
