"""Lets the processes that run the tests take turns where a machine has to be a test's own."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Turns:
    """A lock that many tests share, or one has alone, across the processes of this machine.

    A process that ends, however it ends, lets go. Nothing is written: what is locked are this
    file and its folder.
    """

    def __init__(self) -> None:
        # Whoever waits for the lock holds the gate, so that others cannot pass for ever.
        self._gate = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
        self._lock = os.open(os.path.dirname(__file__), os.O_RDONLY | os.O_CLOEXEC)

    @contextmanager
    def taken(self, *, is_alone: bool) -> Iterator[None]:
        """Hold the lock, alone or with others."""
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
