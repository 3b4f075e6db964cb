"""What one more prompt token costs, learnt from the forwards that run anyway."""

from __future__ import annotations

KEEP = 0.99  # of what is known, with each new forward: machines get busier and quieter


class TokenCost:
    """Seconds per token as the slope of forward time over its tokens, by least squares.

    What a forward costs whatever its size is not in it: a prompt whose beginning is restored pays that too.
    """

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A forward of that many prompt tokens took so long."""
        self._weight = KEEP * self._weight + 1
        self._tokens = KEEP * self._tokens + num_tokens
        self._seconds = KEEP * self._seconds + seconds
        self._squares = KEEP * self._squares + num_tokens**2
        self._products = KEEP * self._products + num_tokens * seconds

    @property
    def per_token_s(self) -> float:
        """0 before the first forward; the plain mean while all forwards were of one size."""
        if not self._tokens:
            return 0.0
        spread = self._weight * self._squares - self._tokens**2
        if spread < 1e-6 * self._weight * self._squares:
            return self._seconds / self._tokens
        return max(0.0, (self._weight * self._products - self._tokens * self._seconds) / spread)
