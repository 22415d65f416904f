"""How long to wait before trying again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_EXPONENT = 32  # 2**32 times any delay is beyond every cap; spares float overflow


def backoff_delay(
    attempt: int,
    *,
    first_delay: float,
    max_delay: float,
    uniform: Callable[[float, float], float] = random.uniform,
) -> float:
    """Return the delay before retry number *attempt*, in seconds.

    The delay doubles with each attempt up to *max_delay* and is then spread
    over its upper half, at the cap as well, so that a fleet whose broker came
    back does not return in one instant.

    Args:
        attempt: 0 for the first retry.
        first_delay: Delay of the first retry before jitter, > 0.
        max_delay: Upper bound of every delay, >= *first_delay*.
        uniform: Source of randomness, ``uniform(low, high)``.

    Source:
        "Equal jitter": ``d = min(cap, first * 2**n)``; ``d/2 + uniform(0, d/2)``.
    """
    delay = min(max_delay, first_delay * 2.0 ** min(attempt, _MAX_EXPONENT))
    return uniform(delay / 2, delay)


@dataclass(frozen=True)
class Backoff:
    """How often a server is tried that does not answer: the one policy for all that is in Redis.

    Attributes:
        max_delay: Upper bound of every delay in seconds, > 0.
        first_delay: Of the first retry, in seconds, > 0.
    """

    max_delay: float
    first_delay: float = 0.05

    def delay(self, failures: int) -> float:
        """Return the delay before the next attempt, in seconds.

        Args:
            failures: Attempts that have failed in a row before the last one.
        """
        first_delay = min(self.first_delay, self.max_delay)
        return backoff_delay(failures, first_delay=first_delay, max_delay=self.max_delay)


DELIVERY_STORE: Final = Backoff(max_delay=0.5)
"""For the store of acknowledged delivery; only the guard's own tasks wait."""

RATE_STORAGE: Final = Backoff(max_delay=5.0, first_delay=5.0)
"""For the store of rates: an event waits for each attempt, so there are few."""
