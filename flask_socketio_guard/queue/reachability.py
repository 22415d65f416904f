"""Reachability of the message queue, shared by the publisher and the listener."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from ..core.runtime import clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..errors import BrokerError

UNREACHABLE: Final = "unreachable"
PERMISSION: Final = "permission"
LASTING: Final = frozenset({"authentication", "certificate", PERMISSION})
"""Categories of errors that retrying does not cure; see :class:`~.errors.BrokerError`."""


class Reachability:
    """The reachability of the message queue from this process.

    Publisher and listener report answers and failures; each change is reported to
    *on_change* once. Safe for threads and greenlets.

    Args:
        check: Opens a new connection and returns ``None`` if the broker
            answered, otherwise the error. Takes a bounded time.
        on_change: Called as ``on_change(is_reachable, reason, duration)``.
    """

    def __init__(
        self,
        check: Callable[[], BrokerError | None],
        *,
        on_change: Callable[[bool, str, float], None],
    ) -> None:
        self._check = check
        self._on_change = on_change
        self._lock = threading.Lock()
        self._lost_at: float | None = None
        self.has_answered = False
        """Whether the broker has ever answered."""
        self.trouble = ""
        """Category of the last error; empty while the broker is reachable."""

    @property
    def is_reachable(self) -> bool:
        """Whether the last report was an answer, or there was none yet."""
        return self._lost_at is None

    @property
    def is_refusing(self) -> bool:
        """Whether the broker refuses this process for a reason that retrying does not cure."""
        return self.trouble in LASTING

    def report_lost(self, reason: str, category: str = UNREACHABLE) -> None:
        """Record that a connection failed, broke, or was not answered."""
        with self._lock:
            is_known = self._lost_at is not None
            is_new_refusal = category in LASTING and category != self.trouble
            self.trouble = category
            if not is_known:
                self._lost_at = clock()
        # A refusal needs an operator, so it is reported even during a known outage.
        if is_new_refusal or not is_known:
            self._on_change(False, reason, 0.0)

    def report_answer(self) -> None:
        """Record that the broker answered."""
        self.has_answered = True
        if self._lost_at is None:
            return
        with self._lock:
            if self._lost_at is None:
                return
            duration, self._lost_at = clock() - self._lost_at, None
            self.trouble = ""
        self._on_change(True, "", duration)

    def check(self) -> bool:
        """Ask the broker over a new connection, and record and return whether it answered."""
        trouble = self._check()
        if trouble is None:
            self.report_answer()
        else:
            self.report_lost(str(trouble), trouble.category)
        return trouble is None
