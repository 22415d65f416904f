"""Counts every loss, failure and rejection."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from . import signals
from .listener import LISTENER_TASK
from .states import ListenerState, TaskState

if TYPE_CHECKING:
    from .signals import CallbackLoss, Failure, ListenerChange, OutboxLoss, Rejection, TaskChange


class Counters:
    """What has happened in one application since it was set up.

    Args:
        sender: The application whose signals are counted.
    """

    def __init__(self, sender: object) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._subscriptions = [
            signals.subscribe(signals.failed, sender, self._failed),
            signals.subscribe(signals.rejected, sender, self._rejected),
            signals.subscribe(signals.callback_lost, sender, self._callback_lost),
            signals.subscribe(signals.listener_changed, sender, self._listener_changed),
            signals.subscribe(signals.outbox_lost, sender, self._outbox_lost),
            signals.subscribe(signals.task_changed, sender, self._task_changed),
        ]

    def as_dict(self) -> dict[str, int]:
        """Return a copy of all counts; what never happened is 0.

        Keys: ``handler_failures``, ``callback_failures``, ``task_failures``,
        ``hook_failures``, ``listener_failures``, ``events_rejected``,
        ``callbacks_expired``, ``callbacks_dropped``, ``outbox_dropped``,
        ``listener_restarts``, ``listener_stalls``, ``task_restarts``.
        """
        with self._lock:
            return {key: self._counts[key] for key in _KEYS}

    def _add(self, key: str, count: int = 1) -> None:
        with self._lock:
            self._counts[key] += count

    def _failed(self, record: Failure) -> None:
        self._add(f"{record.kind}_failures")

    def _rejected(self, record: Rejection) -> None:
        del record
        self._add("events_rejected")

    def _callback_lost(self, record: CallbackLoss) -> None:
        self._add("callbacks_expired" if record.reason == "expired" else "callbacks_dropped")

    def _listener_changed(self, record: ListenerChange) -> None:
        if record.new is ListenerState.STALLED:
            self._add("listener_stalls")

    def _outbox_lost(self, record: OutboxLoss) -> None:
        self._add("outbox_dropped", record.count)

    def _task_changed(self, record: TaskChange) -> None:
        if record.new is TaskState.BACKING_OFF:
            self._add("listener_restarts" if record.name == LISTENER_TASK else "task_restarts")


_KEYS = (
    "handler_failures",
    "callback_failures",
    "task_failures",
    "hook_failures",
    "listener_failures",
    "events_rejected",
    "callbacks_expired",
    "callbacks_dropped",
    "outbox_dropped",
    "listener_restarts",
    "listener_stalls",
    "task_restarts",
)
