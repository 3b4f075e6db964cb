"""In which numbers keys and values are held on the two sides, and travel between them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.geometry import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class KvDtypes:
    """Of the caches of prefill and of decode workers."""

    prefill: str
    decode: str

    def settled(self, natural: str) -> KvDtypes:
        """With a dtype for `auto`."""
        return KvDtypes(*(natural if dtype == "auto" else dtype for dtype in (self.prefill, self.decode)))

    @property
    def are_one(self) -> bool:
        """Whether KV that travels raw is what it was, bit for bit."""
        return self.prefill == self.decode

    @property
    def wire(self) -> str:
        """What raw KV travels in: the narrower, as nothing of the wider one is left at its end. Of two as
        wide the writer's."""
        return min(self.prefill, self.decode, key=DTYPE_BYTES.__getitem__)
