"""What a prompt token costs, learnt from the forwards that run anyway."""

from __future__ import annotations

KEEP = 0.99  # of what is known, with each new forward: machines get busier and quieter


class TokenCost:
    """Seconds per token by least squares through the origin: large forwards decide, small ones hardly count.

    What a forward costs whatever its size is thus nearly left out, as it should be: a prompt whose beginning
    is restored pays that too.
    """

    def __init__(self) -> None:
        self._squares = self._products = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A forward of that many prompt tokens took so long."""
        self._squares = KEEP * self._squares + num_tokens**2
        self._products = KEEP * self._products + num_tokens * seconds

    @property
    def per_token_s(self) -> float:
        """0 before the first forward."""
        return self._products / self._squares if self._squares else 0.0

    def tokens_within(self, seconds: float, least: int, most: int) -> int:
        """Of a forward that takes about so long, from `least` to `most`; `most` before the first forward."""
        token_s = self.per_token_s
        return min(most, max(int(seconds / token_s), least)) if token_s else most
