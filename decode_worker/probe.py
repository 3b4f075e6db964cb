"""When one sequence drafts one token although drafting does not pay: to learn that times have changed.

The wait doubles from probe to probe. A draft that has to read a prompt first is probed when that costs little
beside the plain steps since the last time.
"""

from __future__ import annotations

FIRST_AFTER = 32  # plain steps
MOST_AFTER = 1024
MOST_TRIES = 8  # steps in which a draft may read before it guesses
READ_SHARE = 0.01  # of the time of those plain steps


class Probe:
    """Counts plain steps. Owned by the step thread."""

    def __init__(self) -> None:
        self._after = FIRST_AFTER
        self._num_plain = self._num_tries = 0

    def pass_by(self, num_steps: int) -> None:
        """So many plain steps more."""
        self._num_plain += num_steps

    @property
    def is_near(self) -> bool:
        """Whether enough have passed."""
        return self._num_plain >= self._after

    def is_due(self, read_s: float, plain_s: float) -> bool:
        """Whether to draft in this step; the draft has to read for `read_s`, a plain step takes `plain_s`."""
        if read_s > READ_SHARE * self._num_plain * plain_s:
            return False
        self._num_tries += 1
        if self._num_tries == MOST_TRIES:
            self._end()
        return True

    def has_drafted(self) -> None:
        """The draft gave a token, or was not sure enough to."""
        if self._num_tries:
            self._end()

    def restart(self) -> None:
        """Drafting pays again: what comes after it is new."""
        self._after = FIRST_AFTER

    def _end(self) -> None:
        self._num_plain = self._num_tries = 0
        self._after = min(2 * self._after, MOST_AFTER)
