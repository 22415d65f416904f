"""How long to wait before trying again."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_EXPONENT = 32  # 2**32 times any delay is beyond every cap; spares float overflow
_RECONNECT_FIRST_DELAY = 0.05  # in seconds


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


def reconnect_delay(failures: int, *, max_delay: float) -> float:
    """Return the delay before the next attempt to reach a broker, in seconds.

    Args:
        failures: Attempts that have failed in a row before the last one.
        max_delay: Upper bound of every delay, > 0.
    """
    return backoff_delay(
        failures, first_delay=min(_RECONNECT_FIRST_DELAY, max_delay), max_delay=max_delay
    )
