"""How one token is drawn: what acts on its distribution, and what its random numbers depend on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Probs = npt.NDArray[np.float32]  # [vocab]


class Draw(NamedTuple):
    """Of one row. `temperature` 0 takes the most probable token. The order is that of src/choose.h."""

    seed: int  # as 64 bits without a sign
    position: int
    stream: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int


class Drafted(NamedTuple):
    """What a draft proposed for a row, for speculative sampling to judge."""

    token_id: int  # -1: nothing
    probs: Probs | None = None  # what it was drawn from; None: the draft was sure


NOT_DRAFTED = Drafted(-1)
