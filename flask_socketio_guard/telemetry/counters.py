"""Counts losses, failures and rejections, from their records."""

from __future__ import annotations

from _thread import RLock
from collections import Counter
from typing import TYPE_CHECKING, Final

from ..core.forks import renew_after_fork
from .records import record_classes, subscribe

if TYPE_CHECKING:
    from .records import Record

FOLDED: Final = "log_lines_folded"
"""Key of the number of suppressed log lines, the only count that does not come from records."""


class Counters:
    """Event counts of one application since it was set up.

    Each record class declares what it counts; see :class:`~.records.base.Record`.

    Args:
        sender: The application whose signals are counted.
    """

    def __init__(self, sender: object) -> None:
        # Not gevent's lock, which costs a dozen calls: no holder of this one ever blocks.
        self._lock = RLock()
        renew_after_fork(self, _lock=RLock)
        kinds = [kind for kind in record_classes() if kind.counters]
        keys = [key for kind in kinds for key in kind.counters]
        self._keys = dict.fromkeys([*keys, FOLDED])  # in the order of the record classes
        self._counts: Counter[str] = Counter()
        self._open: set[str] = set()
        self._subscriptions = [subscribe(kind.signal, sender, self._count) for kind in kinds]

    def as_dict(self) -> dict[str, int]:
        """Return a copy of all counts, those that are 0 included.

        Keys: ``handler_failures``, ``callback_failures``, ``task_failures``,
        ``hook_failures``, ``listener_failures``, ``events_rejected``,
        ``callbacks_expired``, ``callbacks_dropped``, ``outbox_dropped``,
        ``listener_restarts``, ``listener_stalls``, ``task_restarts``,
        ``connections_opened`` (accepted by their connect handlers),
        ``connections_closed`` (accepted before, and disconnected since),
        ``connections_swept``, ``handshakes_refused``, ``sessions_elsewhere`` (the refused
        handshakes whose session does not belong to this process), ``protocol_violations``,
        ``sends_dropped``, ``messages_repeated`` (duplicates from another process, dropped),
        ``deliveries_acknowledged``, ``deliveries_dead`` (expired,
        refused, or for a connection that is gone), ``deliveries_withdrawn`` (cancelled or
        replaced), ``deliveries_abandoned`` (lost with the process), ``loop_blocks``,
        ``log_lines_folded``.
        """
        with self._lock:
            return {key: self._counts[key] for key in self._keys}

    def add(self, key: str, count: int = 1) -> None:
        """Increase a count that does not come from records.

        Args:
            key: As in :meth:`as_dict`.
            count: The increment, >= 0.

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
