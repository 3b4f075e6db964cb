"""What a prompt token costs, learnt from the forwards that run anyway."""

from __future__ import annotations

PATIENCE = 1.0  # times as long as a prompt takes alone it lets shorter ones by
LEAST_CHUNK_TOKENS = 64  # of a prompt between steps of others: in shorter ones each token takes longer
KEEP = 0.9  # of what is known, with each new forward: contexts grow, machines get busier and quieter


class TokenCost:
    """Seconds per token by least squares through the origin: large forwards decide, small ones hardly count.

    What a forward costs whatever its size is thus nearly left out, as it should be: a prompt whose beginning
    is restored pays that too. `num_cores` are those of the forward that comes; each number of them is learnt
    by itself, and until it was seen it is taken to be as fast as it is large.
    """

    def __init__(self) -> None:
        self.num_cores = 1
        self._sums: dict[int, tuple[float, float]] = {}  # by cores: of squares, of products with the time

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A forward of that many prompt tokens took so long."""
        squares, products = self._sums.get(self.num_cores, (0.0, 0.0))
        self._sums[self.num_cores] = KEEP * squares + num_tokens**2, KEEP * products + num_tokens * seconds

    @property
    def per_token_s(self) -> float:
        """0 before the first forward."""
        return self.per_token_with(self.num_cores)

    def per_token_with(self, num_cores: int) -> float:
        """The same for another number of cores than those of the forward that comes."""
        known = tuple(self._sums)  # the step thread may add to them meanwhile
        if not known:
            return 0.0
        seen = min(known, key=lambda each: abs(each - num_cores))
        squares, products = self._sums[seen]
        return products / squares * seen / num_cores

    def is_patience_over(self, waited_s: float, num_tokens: int, num_computed: int) -> bool:
        """Whether a prompt of `num_tokens`, here for `waited_s`, has let others by for as long as it may."""
        token_s = self.per_token_s
        return waited_s - token_s * num_computed > PATIENCE * token_s * num_tokens > 0

    def tokens_within(self, seconds: float, least: int, most: int) -> int:
        """Of a forward that takes about so long, from `least` to `most`; `most` before the first forward."""
        token_s = self.per_token_s
        return min(most, max(int(seconds / token_s), least)) if token_s else most
