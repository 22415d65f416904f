"""Retry delays: exponential backoff with jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_EXPONENT = 32  # 2**32 times any delay exceeds every cap; prevents float overflow


def backoff_delay(
    attempt: int,
    *,
    first_delay: float,
    max_delay: float,
    uniform: Callable[[float, float], float] = random.uniform,
) -> float:
    """Return the delay before retry number *attempt*, in seconds.

    The delay doubles with each attempt up to *max_delay*. Jitter then spreads it
    over its upper half, at the cap as well, which keeps a fleet of processes from
    reconnecting at the same moment.

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
    """The retry policy for an unreachable server, shared by all users of Redis.

    Attributes:
        max_delay: Upper bound of every delay in seconds, > 0.
        first_delay: Delay of the first retry in seconds, > 0.
    """

    max_delay: float
    first_delay: float = 0.05

    def delay(self, failures: int) -> float:
        """Return the delay before the next attempt, in seconds.

        Args:
            failures: Number of consecutive failures before the last attempt.
        """
        first_delay = min(self.first_delay, self.max_delay)
        return backoff_delay(failures, first_delay=first_delay, max_delay=self.max_delay)


DELIVERY_STORE: Final = Backoff(max_delay=0.5)
"""For the store of acknowledged delivery; short, because only the guard's own tasks retry."""

RATE_STORAGE: Final = Backoff(max_delay=5.0, first_delay=5.0)
"""For the storage of rate limits; long, because an event has to wait for each attempt."""
