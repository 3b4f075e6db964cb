"""Whether own kernels serve what is beside the forward: choosing tokens, moving blocks."""

from __future__ import annotations

from functools import cache

from tandem.engine.native import build, library
from tandem.engine.native.build import NotNativeError
from tandem.errors import ConfigError


def kernels_for(device: str) -> str | None:
    """The instruction set of the kernels for tensors on this kind of device; None: torch does it."""
    if device != "cpu":
        return None
    try:
        isa = build.instruction_set()
    except (NotNativeError, ConfigError):
        return None
    return isa if can_load(isa) else None


@cache
def can_load(isa: str) -> bool:
    """Whether there is a library for this instruction set that passes its check. Tried once."""
    try:
        library.load(isa)
    except (NotNativeError, ConfigError):
        return False
    return True
