"""Wait for a condition with a deadline."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")

if "--stock" in sys.argv:
    os.environ["IS_STOCK"] = "1"  # for the processes that run the tests for this one

USUAL_TIMEOUT = 5.0 if "IS_STOCK" in os.environ else 15.0
"""Seconds that tests wait for what should come at once: a busy machine stands still for some.

Without the guard most of it never comes.
"""

_LONGEST_INTERVAL = 0.05
_PATIENCE = 0.1


class DeadlineExceeded(AssertionError):
    """A condition that a test waits for did not come true in time."""


def wait_until(
    condition: Callable[[], Value],
    *,
    timeout: float = USUAL_TIMEOUT,
    message: str = "the condition did not come true",
    interval: float = 0.01,
) -> Value:
    """Call *condition* until it returns something true, and return that.

    Args:
        condition: Called at least once, and once more when the time is up.
        timeout: Longest wait in seconds.
        message: Says in the error what was waited for.
        interval: Seconds between two calls at least. What has been waited for for long is asked
            for less often, so that those who wait leave the machine to others.

    Raises:
        DeadlineExceeded: *condition* was still false after *timeout* seconds.
    """
    began_at = time.monotonic()
    while True:
        waited = time.monotonic() - began_at
        is_last_call = waited >= timeout
        value = condition()
        if value:
            return value
        if is_last_call:
            raise DeadlineExceeded(f"{message} (waited {timeout:g} s)")
        time.sleep(max(interval, min(_PATIENCE * waited, _LONGEST_INTERVAL)))
