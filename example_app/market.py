"""The goods and prices of the Harbour Exchange, and the types of its events."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

# Each pit is a Socket.IO room: its name, and the mean price per lot.
Pit = Literal["Coffee", "Cocoa", "Saffron", "Tea"]
PITS: dict[Pit, float] = {"Coffee": 184.0, "Cocoa": 262.0, "Saffron": 1490.0, "Tea": 96.0}

Side = Literal["buy", "sell"]
Lots = Annotated[int, Field(strict=True, ge=1, le=100)]


def price(pit: Pit, at: int) -> float:
    """Return the price of *pit* in the second *at*.

    It depends only on the arguments, so all processes quote the same price without exchanging
    messages.

    Args:
        pit: One of `PITS`.
        at: Unix time in whole seconds.
    """
    phase = sum(map(ord, pit))
    drift = 0.030 * math.sin(at / 97 + phase) + 0.012 * math.sin(at / 23 + 2 * phase)
    jitter = 0.005 * (math.sin(at * 12.9898 + phase) * 43758.5453 % 1 - 0.5)
    return round(PITS[pit] * (1 + drift + jitter), 2)
