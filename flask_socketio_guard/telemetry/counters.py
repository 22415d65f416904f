"""Counts every loss, failure and rejection."""

from __future__ import annotations

from _thread import RLock
from collections import Counter
from typing import TYPE_CHECKING

from ..core.forks import renew_after_fork
from ..states import ConnectionState, DeliveryState, ListenerState, TaskState
from . import records as signals

if TYPE_CHECKING:
    from .records import (
        CallbackLoss,
        ConnectionChange,
        DeliveryEnd,
        DeliveryLoss,
        Failure,
        HandshakeRefusal,
        ListenerChange,
        LoopBlock,
        OutboxLoss,
        Rejection,
        Repetition,
        SendLoss,
        Sweep,
        TaskChange,
        Violation,
    )


class Counters:
    """What has happened in one application since it was set up.

    Args:
        sender: The application whose signals are counted.
    """

    def __init__(self, sender: object) -> None:
        # Not gevent's, which costs a dozen calls: nobody waits while holding it.
        self._lock = RLock()
        renew_after_fork(self, _lock=RLock)
        self._counts: Counter[str] = Counter()
        self._open: set[str] = set()
        self._subscriptions = [
            signals.subscribe(signals.failed, sender, self._failed),
            signals.subscribe(signals.rejected, sender, self._rejected),
            signals.subscribe(signals.callback_lost, sender, self._callback_lost),
            signals.subscribe(signals.listener_changed, sender, self._listener_changed),
            signals.subscribe(signals.outbox_lost, sender, self._outbox_lost),
            signals.subscribe(signals.task_changed, sender, self._task_changed),
            signals.subscribe(signals.connection_changed, sender, self._connection_changed),
            signals.subscribe(signals.handshake_refused, sender, self._handshake_refused),
            signals.subscribe(signals.protocol_violated, sender, self._protocol_violated),
            signals.subscribe(signals.send_lost, sender, self._send_lost),
            signals.subscribe(signals.message_repeated, sender, self._message_repeated),
            signals.subscribe(signals.connections_swept, sender, self._connections_swept),
            signals.subscribe(signals.delivery_ended, sender, self._delivery_ended),
            signals.subscribe(signals.deliveries_abandoned, sender, self._deliveries_abandoned),
            signals.subscribe(signals.loop_blocked, sender, self._loop_blocked),
        ]

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
            return {key: self._counts[key] for key in _KEYS}

    def add(self, key: str, count: int = 1) -> None:
        """Count what has no signal.

        Args:
            key: As in :meth:`as_dict`.
            count: How many, >= 0.

        Raises:
            KeyError: There is no such count.
        """
        if key not in _KEYS:
            raise KeyError(key)
        self._add(key, count)

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
            self._add(
                "listener_restarts" if record.name == signals.LISTENER_TASK else "task_restarts"
            )

    def _connection_changed(self, record: ConnectionChange) -> None:
        if record.new is ConnectionState.OPEN:
            with self._lock:
                self._open.add(record.sid)
                self._counts["connections_opened"] += 1
        elif record.new is ConnectionState.CLOSED:
            with self._lock:
                # Who leaves during its connect handler is closed, but never was open.
                if record.sid in self._open:
                    self._open.remove(record.sid)
                    self._counts["connections_closed"] += 1

    def _handshake_refused(self, record: HandshakeRefusal) -> None:
        self._add("handshakes_refused")
        if record.reason == "elsewhere":
            self._add("sessions_elsewhere")

    def _protocol_violated(self, record: Violation) -> None:
        del record
        self._add("protocol_violations")

    def _send_lost(self, record: SendLoss) -> None:
        self._add("sends_dropped", record.count)

    def _message_repeated(self, record: Repetition) -> None:
        del record
        self._add("messages_repeated")

    def _connections_swept(self, record: Sweep) -> None:
        self._add("connections_swept", record.count)

    def _delivery_ended(self, record: DeliveryEnd) -> None:
        self._add(_DELIVERY_KEYS.get(record.state, "deliveries_dead"))

    def _deliveries_abandoned(self, record: DeliveryLoss) -> None:
        self._add("deliveries_abandoned", record.count)

    def _loop_blocked(self, record: LoopBlock) -> None:
        if record.duration is not None:
            self._add("loop_blocks")


_DELIVERY_KEYS = {
    DeliveryState.DELIVERED: "deliveries_acknowledged",
    DeliveryState.CANCELLED: "deliveries_withdrawn",
    DeliveryState.REPLACED: "deliveries_withdrawn",
}

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
    "connections_opened",
    "connections_closed",
    "connections_swept",
    "handshakes_refused",
    "sessions_elsewhere",
    "protocol_violations",
    "sends_dropped",
    "messages_repeated",
    "deliveries_acknowledged",
    "deliveries_dead",
    "deliveries_withdrawn",
    "deliveries_abandoned",
    "loop_blocks",
    "log_lines_folded",
)
