"""Whether the message queue answers: one truth for all who talk to it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .runtime import clock

if TYPE_CHECKING:
    from collections.abc import Callable


class Broker:
    """The reachability of the message queue, as the process knows it.

    Publisher and listener report what they see; each change is passed on once.
    Safe for threads and greenlets.

    Args:
        check: Opens a fresh connection and returns ``None`` if the broker
            answered, else the reason. Takes a bounded time.
        on_change: Called as ``on_change(is_reachable, reason, duration)``.
    """

    def __init__(
        self,
        check: Callable[[], str | None],
        *,
        on_change: Callable[[bool, str, float], None],
    ) -> None:
        self._check = check
        self._on_change = on_change
        self._lock = threading.Lock()
        self._lost_at: float | None = None
        self.has_answered = False
        """Whether there was an answer at any time."""

    @property
    def is_reachable(self) -> bool:
        """Whether the last word from the broker was an answer."""
        return self._lost_at is None

    def report_lost(self, reason: str) -> None:
        """Take note that a connection failed, broke, or was not answered."""
        with self._lock:
            if self._lost_at is not None:
                return
            self._lost_at = clock()
        self._on_change(False, reason, 0.0)

    def report_answer(self) -> None:
        """Take note that the broker answered."""
        self.has_answered = True
        if self._lost_at is None:
            return
        with self._lock:
            if self._lost_at is None:
                return
            duration, self._lost_at = clock() - self._lost_at, None
        self._on_change(True, "", duration)

    def check(self) -> bool:
        """Ask over a fresh connection, report the outcome, and return it."""
        reason = self._check()
        if reason is None:
            self.report_answer()
        else:
            self.report_lost(reason)
        return reason is None
