"""The states of process, listener, tasks, connections and deliveries, and the one way to move on.

Pure: no I/O, no clock. Each table lists every legal move; what is not in it is
illegal, raises and changes nothing.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

from .errors import InvalidTransition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class _Named(Enum):
    """An enum that prints as its value."""

    # Members are singletons; Enum's own is a function, called twice for each look at a table.
    __hash__ = object.__hash__

    def __str__(self) -> str:
        return str(self.value)


class Phase(_Named):
    """Where a process stands."""

    NEW = "new"
    EMITTING = "emitting"
    """It emits or delivers, and serves nobody."""
    STARTING = "starting"
    """It is about to serve, or has failed to: that is not tried again."""
    SERVING = "serving"
    DRAINING = "draining"
    """Its clients are let go; they are gone once that is over."""
    STOPPED = "stopped"


class PhaseEvent(_Named):
    """What can happen to a process."""

    EMIT = "emit"
    SERVE = "serve"
    SERVED = "served"
    """All that serves clients has started."""
    DRAIN = "drain"
    STOP = "stop"


class ListenerState(_Named):
    """What is known of the message-queue listener of a process."""

    ABSENT = "absent"
    """No message queue is configured."""
    IDLE = "idle"
    """Not started yet."""
    STARTING = "starting"
    """Started; no probe has come back yet."""
    RUNNING = "running"
    """The newest probes came back."""
    RECONNECTING = "reconnecting"
    """The broker does not answer."""
    STALLED = "stalled"
    """The broker answers, but the probe does not come back."""
    STOPPED = "stopped"


class ListenerEvent(_Named):
    """What can happen to a listener."""

    START = "start"
    HEARD = "heard"
    """A probe came back through the listener."""
    BROKER_LOST = "broker-lost"
    PROBE_OVERDUE = "probe-overdue"
    CRASHED = "crashed"
    """The reader ended, or cannot subscribe although the broker answers."""
    STOP = "stop"


class TaskState(_Named):
    """Where a supervised task is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    BACKING_OFF = "backing-off"
    FAILED = "failed"
    """It crashed and is not restarted: by policy, or restart intensity was exceeded."""
    FINISHED = "finished"
    STOPPED = "stopped"


class TaskEvent(_Named):
    """What can happen to a supervised task."""

    STARTED = "started"
    CRASHED = "crashed"
    """It ended and will be restarted."""
    RETRY = "retry"
    GAVE_UP = "gave-up"
    RETURNED = "returned"
    STOP = "stop"


class ConnectionState(_Named):
    """Where a client's connection to a namespace is in its life."""

    CONNECTING = "connecting"
    """The connect handler has not decided yet."""
    OPEN = "open"
    """The connect handler accepted it."""
    READY = "ready"
    """The application's own handshake is done, where it has one."""
    CLOSING = "closing"
    """It is to end; connect or disconnect handler may be running."""
    CLOSED = "closed"


class ConnectionEvent(_Named):
    """What can happen to a connection."""

    ACCEPTED = "accepted"
    """The connect handler let the client in."""
    REFUSED = "refused"
    """The connect handler did not let the client in."""
    HANDSHAKE = "handshake"
    """The application's own handshake was completed."""
    CLOSE = "close"
    """Server or client wants to end it, or the transport is gone."""
    FINISHED = "finished"
    """The disconnect handler has run, where it had to."""


class DeliveryState(str, Enum):
    """The state of a message of acknowledged delivery. Equal to its value, a string."""

    PENDING = "pending"
    """Nobody has it: the recipient is away, or its turn has not come."""
    IN_FLIGHT = "in_flight"
    """It was sent, and is not acknowledged yet."""
    DELIVERED = "delivered"
    """The recipient has acknowledged it."""
    EXPIRED = "expired"
    """Its deadline passed first."""
    GONE = "gone"
    """It was for one connection, and that has closed."""
    REFUSED = "refused"
    """The recipient answered that it will not have it."""
    CANCELLED = "cancelled"
    """The sender took it back."""
    REPLACED = "replaced"
    """A newer message with the same key took its place."""

    __hash__ = str.__hash__  # that of Enum is written in Python

    def __str__(self) -> str:
        return self.value


class DeliveryEvent(_Named):
    """What can happen to such a message."""

    SENT = "sent"
    RETURNED = "returned"
    """Whoever it was sent to has left or did not answer in time."""
    ACKNOWLEDGED = "acknowledged"
    DEADLINE_PASSED = "deadline-passed"
    RECIPIENT_GONE = "recipient-gone"
    REFUSE = "refuse"
    CANCEL = "cancel"
    REPLACE = "replace"


class SendingState(_Named):
    """Where a message is on its way to the connections of one process."""

    QUEUED = "queued"
    """It waits for its turn."""
    AWAITING = "awaiting"
    """It was sent; until it is acknowledged, it takes one of the places in flight."""
    SCHEDULED = "scheduled"
    """A timer will queue it again."""
    IDLE = "idle"
    """Nobody who is here has to get it: it is about to end, or others lack it."""
    PARKED = "parked"
    """It has made room for others, and is left to the store for a while."""
    DROPPED = "dropped"
    """It has ended, or was returned to the store."""


class SendingEvent(_Named):
    """What can happen to a message on that way."""

    QUEUE = "queue"
    SEND = "send"
    SKIP = "skip"
    """Its turn came, and there was nobody to send it to."""
    SCHEDULE = "schedule"
    SETTLED = "settled"
    """All who have it acknowledged it, or one answer was enough."""
    PARK = "park"
    DROP = "drop"


PHASE_TRANSITIONS: Mapping[tuple[Phase, PhaseEvent], Phase] = {
    (Phase.NEW, PhaseEvent.EMIT): Phase.EMITTING,
    (Phase.NEW, PhaseEvent.DRAIN): Phase.DRAINING,
    (Phase.NEW, PhaseEvent.STOP): Phase.STOPPED,
    (Phase.EMITTING, PhaseEvent.SERVE): Phase.STARTING,
    (Phase.EMITTING, PhaseEvent.DRAIN): Phase.DRAINING,
    (Phase.EMITTING, PhaseEvent.STOP): Phase.STOPPED,
    (Phase.STARTING, PhaseEvent.SERVED): Phase.SERVING,
    (Phase.STARTING, PhaseEvent.DRAIN): Phase.DRAINING,
    (Phase.STARTING, PhaseEvent.STOP): Phase.STOPPED,
    (Phase.SERVING, PhaseEvent.DRAIN): Phase.DRAINING,
    (Phase.SERVING, PhaseEvent.STOP): Phase.STOPPED,
    (Phase.DRAINING, PhaseEvent.STOP): Phase.STOPPED,
    (Phase.STOPPED, PhaseEvent.STOP): Phase.STOPPED,
}

LISTENER_TRANSITIONS: Mapping[tuple[ListenerState, ListenerEvent], ListenerState] = {
    (ListenerState.IDLE, ListenerEvent.START): ListenerState.STARTING,
    (ListenerState.IDLE, ListenerEvent.STOP): ListenerState.STOPPED,
    (ListenerState.STARTING, ListenerEvent.HEARD): ListenerState.RUNNING,
    (ListenerState.STARTING, ListenerEvent.BROKER_LOST): ListenerState.RECONNECTING,
    (ListenerState.STARTING, ListenerEvent.PROBE_OVERDUE): ListenerState.STALLED,
    (ListenerState.STARTING, ListenerEvent.CRASHED): ListenerState.STALLED,
    (ListenerState.STARTING, ListenerEvent.STOP): ListenerState.STOPPED,
    (ListenerState.RUNNING, ListenerEvent.HEARD): ListenerState.RUNNING,
    (ListenerState.RUNNING, ListenerEvent.BROKER_LOST): ListenerState.RECONNECTING,
    (ListenerState.RUNNING, ListenerEvent.PROBE_OVERDUE): ListenerState.STALLED,
    (ListenerState.RUNNING, ListenerEvent.CRASHED): ListenerState.STALLED,
    (ListenerState.RUNNING, ListenerEvent.STOP): ListenerState.STOPPED,
    (ListenerState.RECONNECTING, ListenerEvent.HEARD): ListenerState.RUNNING,
    (ListenerState.RECONNECTING, ListenerEvent.BROKER_LOST): ListenerState.RECONNECTING,
    (ListenerState.RECONNECTING, ListenerEvent.PROBE_OVERDUE): ListenerState.STALLED,
    (ListenerState.RECONNECTING, ListenerEvent.CRASHED): ListenerState.STALLED,
    (ListenerState.RECONNECTING, ListenerEvent.STOP): ListenerState.STOPPED,
    (ListenerState.STALLED, ListenerEvent.HEARD): ListenerState.RUNNING,
    (ListenerState.STALLED, ListenerEvent.BROKER_LOST): ListenerState.RECONNECTING,
    (ListenerState.STALLED, ListenerEvent.PROBE_OVERDUE): ListenerState.STALLED,
    (ListenerState.STALLED, ListenerEvent.CRASHED): ListenerState.STALLED,
    (ListenerState.STALLED, ListenerEvent.STOP): ListenerState.STOPPED,
    (ListenerState.STOPPED, ListenerEvent.START): ListenerState.STARTING,
    (ListenerState.STOPPED, ListenerEvent.STOP): ListenerState.STOPPED,
}

TASK_TRANSITIONS: Mapping[tuple[TaskState, TaskEvent], TaskState] = {
    (TaskState.STARTING, TaskEvent.STARTED): TaskState.RUNNING,
    (TaskState.STARTING, TaskEvent.CRASHED): TaskState.BACKING_OFF,
    (TaskState.STARTING, TaskEvent.GAVE_UP): TaskState.FAILED,
    (TaskState.STARTING, TaskEvent.STOP): TaskState.STOPPED,
    (TaskState.RUNNING, TaskEvent.CRASHED): TaskState.BACKING_OFF,
    (TaskState.RUNNING, TaskEvent.GAVE_UP): TaskState.FAILED,
    (TaskState.RUNNING, TaskEvent.RETURNED): TaskState.FINISHED,
    (TaskState.RUNNING, TaskEvent.STOP): TaskState.STOPPED,
    (TaskState.BACKING_OFF, TaskEvent.RETRY): TaskState.STARTING,
    (TaskState.BACKING_OFF, TaskEvent.STOP): TaskState.STOPPED,
    (TaskState.FAILED, TaskEvent.STOP): TaskState.FAILED,
    (TaskState.FINISHED, TaskEvent.STOP): TaskState.FINISHED,
    (TaskState.STOPPED, TaskEvent.STOP): TaskState.STOPPED,
}

CONNECTION_TRANSITIONS: Mapping[tuple[ConnectionState, ConnectionEvent], ConnectionState] = {
    (ConnectionState.CONNECTING, ConnectionEvent.ACCEPTED): ConnectionState.OPEN,
    (ConnectionState.CONNECTING, ConnectionEvent.REFUSED): ConnectionState.CLOSED,
    (ConnectionState.CONNECTING, ConnectionEvent.CLOSE): ConnectionState.CLOSING,
    (ConnectionState.OPEN, ConnectionEvent.HANDSHAKE): ConnectionState.READY,
    (ConnectionState.OPEN, ConnectionEvent.CLOSE): ConnectionState.CLOSING,
    (ConnectionState.READY, ConnectionEvent.HANDSHAKE): ConnectionState.READY,
    (ConnectionState.READY, ConnectionEvent.CLOSE): ConnectionState.CLOSING,
    # The client left while its connect handler ran; what that says still counts.
    (ConnectionState.CLOSING, ConnectionEvent.ACCEPTED): ConnectionState.CLOSING,
    (ConnectionState.CLOSING, ConnectionEvent.REFUSED): ConnectionState.CLOSED,
    (ConnectionState.CLOSING, ConnectionEvent.CLOSE): ConnectionState.CLOSING,
    (ConnectionState.CLOSING, ConnectionEvent.FINISHED): ConnectionState.CLOSED,
    (ConnectionState.CLOSED, ConnectionEvent.CLOSE): ConnectionState.CLOSED,
}

# An end is final: of two that come at once, the first counts.
DELIVERY_TRANSITIONS: Mapping[tuple[DeliveryState, DeliveryEvent], DeliveryState] = {
    (state, event): new
    for state in (DeliveryState.PENDING, DeliveryState.IN_FLIGHT)
    for event, new in (
        (DeliveryEvent.SENT, DeliveryState.IN_FLIGHT),
        (DeliveryEvent.RETURNED, DeliveryState.PENDING),
        # It may come late, from one that has been taken for lost.
        (DeliveryEvent.ACKNOWLEDGED, DeliveryState.DELIVERED),
        (DeliveryEvent.DEADLINE_PASSED, DeliveryState.EXPIRED),
        (DeliveryEvent.RECIPIENT_GONE, DeliveryState.GONE),
        (DeliveryEvent.REFUSE, DeliveryState.REFUSED),
        (DeliveryEvent.CANCEL, DeliveryState.CANCELLED),
        (DeliveryEvent.REPLACE, DeliveryState.REPLACED),
    )
}

SENDING_TRANSITIONS: Mapping[tuple[SendingState, SendingEvent], SendingState] = {
    (SendingState.QUEUED, SendingEvent.SEND): SendingState.AWAITING,
    (SendingState.QUEUED, SendingEvent.SKIP): SendingState.IDLE,
    (SendingState.QUEUED, SendingEvent.SCHEDULE): SendingState.SCHEDULED,
    (SendingState.QUEUED, SendingEvent.DROP): SendingState.DROPPED,
    (SendingState.AWAITING, SendingEvent.SCHEDULE): SendingState.SCHEDULED,
    (SendingState.AWAITING, SendingEvent.SETTLED): SendingState.IDLE,
    (SendingState.AWAITING, SendingEvent.PARK): SendingState.PARKED,
    (SendingState.AWAITING, SendingEvent.DROP): SendingState.DROPPED,
    (SendingState.SCHEDULED, SendingEvent.QUEUE): SendingState.QUEUED,
    # A connection has come that lacks it.
    (SendingState.SCHEDULED, SendingEvent.SEND): SendingState.AWAITING,
    (SendingState.SCHEDULED, SendingEvent.SKIP): SendingState.IDLE,
    (SendingState.SCHEDULED, SendingEvent.SCHEDULE): SendingState.SCHEDULED,
    (SendingState.SCHEDULED, SendingEvent.SETTLED): SendingState.IDLE,
    (SendingState.SCHEDULED, SendingEvent.DROP): SendingState.DROPPED,
    (SendingState.IDLE, SendingEvent.QUEUE): SendingState.QUEUED,
    (SendingState.IDLE, SendingEvent.SEND): SendingState.AWAITING,
    (SendingState.IDLE, SendingEvent.SKIP): SendingState.IDLE,
    (SendingState.IDLE, SendingEvent.SCHEDULE): SendingState.SCHEDULED,
    (SendingState.IDLE, SendingEvent.DROP): SendingState.DROPPED,
    (SendingState.PARKED, SendingEvent.QUEUE): SendingState.QUEUED,
    (SendingState.PARKED, SendingEvent.DROP): SendingState.DROPPED,
    # An answer may come late; it counts, and the message stays where it is.
    (SendingState.QUEUED, SendingEvent.SETTLED): SendingState.QUEUED,
    (SendingState.IDLE, SendingEvent.SETTLED): SendingState.IDLE,
    (SendingState.PARKED, SendingEvent.SETTLED): SendingState.PARKED,
    (SendingState.DROPPED, SendingEvent.SETTLED): SendingState.DROPPED,
}

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class StateMachine(Generic[S, E]):
    """Holds one state and changes it by a transition table only.

    Args:
        initial: The first state.
        transitions: Every legal (state, event) pair with the state it leads to.
        on_change: Called as ``on_change(old, new, reason)`` after each change
            of state; not called when an event leaves the state as it is.
    """

    def __init__(
        self,
        initial: S,
        transitions: Mapping[tuple[S, E], S],
        *,
        on_change: Callable[[S, S, str], None] | None = None,
    ) -> None:
        self._state = initial
        self._transitions = transitions
        self._on_change = on_change

    @property
    def state(self) -> S:
        """The present state."""
        return self._state

    def allows(self, event: E) -> bool:
        """Say whether *event* is legal now."""
        return (self._state, event) in self._transitions

    def send(self, event: E, reason: str = "") -> S:
        """Apply *event* and return the new state.

        Args:
            event: What happened.
            reason: Why, for those who are told of the change.

        Raises:
            InvalidTransition: The table has no such move; nothing is changed.
        """
        old = self._state
        new = self._transitions.get((old, event))
        if new is None:
            raise InvalidTransition(old, event)
        self._state = new
        if new is not old and self._on_change is not None:
            self._on_change(old, new, reason)
        return new
