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
        self._is_kept = False

    @contextmanager
    def taken(self, *, is_alone: bool, is_next_alone: bool) -> Iterator[None]:
        """Hold the lock, alone or with others.

        Tests in a row that want to be alone are so together: between any two of them each other
        process would run one of its own, and this one would wait for it.
        """
        if not self._is_kept:
            self._take(fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            self._is_kept = is_alone and is_next_alone
            if not self._is_kept:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _take(self, kind: int) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lock, kind)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
