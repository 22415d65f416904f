"""Counts every loss, failure and rejection."""

from __future__ import annotations

from _thread import RLock
from collections import Counter
from typing import TYPE_CHECKING, Final

from ..core.forks import renew_after_fork
from .records import record_classes, subscribe

if TYPE_CHECKING:
    from .records import Record

FOLDED: Final = "log_lines_folded"
"""The count of lines that were kept back, which are no records."""


class Counters:
    """What has happened in one application since it was set up.

    Each class of records says what it counts; see :class:`~.records.base.Record`.

    Args:
        sender: The application whose signals are counted.
    """

    def __init__(self, sender: object) -> None:
        # Not gevent's, which costs a dozen calls: nobody waits while holding it.
        self._lock = RLock()
        renew_after_fork(self, _lock=RLock)
        kinds = [kind for kind in record_classes() if kind.counters]
        keys = [key for kind in kinds for key in kind.counters]
        self._keys = dict.fromkeys([*keys, FOLDED])  # in the order of their records
        self._counts: Counter[str] = Counter()
        self._open: set[str] = set()
        self._subscriptions = [subscribe(kind.signal, sender, self._count) for kind in kinds]

    def as_dict(self) -> dict[str, int]:
        """Return a copy of all counts; what never happened is 0.

        Keys: ``handler_failures``, ``callback_failures``, ``task_failures``,
        ``hook_failures``, ``listener_failures``, ``events_rejected``,
        ``callbacks_expired``, ``callbacks_dropped``, ``outbox_dropped``,
        ``listener_restarts``, ``listener_stalls``, ``task_restarts``,
        ``connections_opened`` (let in by their connect handlers),
        ``connections_closed`` (of those, the ones that are gone),
        ``connections_swept``, ``handshakes_refused``, ``sessions_elsewhere`` (of those,
        the ones whose session is not of this process), ``protocol_violations``,
        ``sends_dropped``, ``messages_repeated`` (by another process, and dropped),
        ``deliveries_acknowledged``, ``deliveries_dead`` (expired,
        refused, or for a connection that is gone), ``deliveries_withdrawn`` (cancelled or
        replaced), ``deliveries_abandoned`` (lost with the process), ``loop_blocks``,
        ``log_lines_folded``.
        """
        with self._lock:
            return {key: self._counts[key] for key in self._keys}

    def add(self, key: str, count: int = 1) -> None:
        """Count what has no signal.

        Args:
            key: As in :meth:`as_dict`.
            count: How many, >= 0.

        Raises:
            KeyError: There is no such count.
        """
        if key not in self._keys:
            raise KeyError(key)
        with self._lock:
            self._counts[key] += count

    def _count(self, record: Record) -> None:
        counts = self._counts
        with self._lock:
            for key, amount in record.amounts(self._open).items():
                counts[key] += amount
