"""Whether the message queue answers: one truth for all who talk to it."""

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
"""Categories of trouble that waiting does not mend; see :class:`~.errors.BrokerError`."""


class Reachability:
    """The reachability of the message queue, as the process knows it.

    Publisher and listener report what they see; each change is passed on once.
    Safe for threads and greenlets.

    Args:
        check: Opens a fresh connection and returns ``None`` if the broker
            answered, else what went wrong. Takes a bounded time.
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
        """Whether there was an answer at any time."""
        self.trouble = ""
        """Category of what keeps it from being reached; empty while nothing does."""

    @property
    def is_reachable(self) -> bool:
        """Whether the last word from the broker was an answer."""
        return self._lost_at is None

    @property
    def is_refusing(self) -> bool:
        """Whether it will not have this process, and waiting does not mend that."""
        return self.trouble in LASTING

    def report_lost(self, reason: str, category: str = UNREACHABLE) -> None:
        """Take note that a connection failed, broke, or was not answered."""
        with self._lock:
            is_known = self._lost_at is not None
            is_news = category in LASTING and category != self.trouble
            self.trouble = category
            if not is_known:
                self._lost_at = clock()
        # Of what waiting does not mend people are told, although it was away already.
        if is_news or not is_known:
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
            self.trouble = ""
        self._on_change(True, "", duration)

    def check(self) -> bool:
        """Ask over a fresh connection, report the outcome, and return it."""
        trouble = self._check()
        if trouble is None:
            self.report_answer()
        else:
            self.report_lost(str(trouble), trouble.category)
        return trouble is None
