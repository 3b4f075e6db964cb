"""Whether, and how soon, a line that failed is sent again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tandem.errors import Internal, Overloaded, StreamBroken, TandemError, Unavailable

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0


def is_overload(error: TandemError) -> bool:
    """The service has no room yet: that is no fault of the line, and never counts against it."""
    return isinstance(error, Overloaded) or error.reason == "DEADLINE_QUEUE"


def may_retry(error: TandemError) -> bool:
    """A line of a queue is asked for as a whole, so one whose stream broke can be asked for again."""
    return error.retry.allowed or isinstance(error, StreamBroken | Internal)


@dataclass(slots=True)
class Attempts:
    """The history of one line. `max_counted` failures of its own make it a dead letter.

    While the service is away, everybody fails. So a failure for that reason counts only if other lines
    were completed since this one was sent: then the service was there.
    """

    max_counted: int
    counted: int = 0
    sent: int = 0

    def give_up(self, error: TandemError, *, others_completed: bool) -> bool:
        """Note a failure; whether it is the last."""
        self.sent += 1
        if not may_retry(error):
            return True
        if not is_overload(error) and (others_completed or not isinstance(error, Unavailable)):
            self.counted += 1
        return self.counted >= self.max_counted

    def backoff_s(self, error: TandemError) -> float:
        """What the service says, or exponential; with jitter, so that lines do not come back together."""
        hinted_s = (error.retry_after_ms or 0) / 1e3
        backoff_s = min(FIRST_BACKOFF_S * float(1 << min(self.sent, 10)), MAX_BACKOFF_S)
        return max(hinted_s, backoff_s) * random.uniform(0.5, 1.0)
