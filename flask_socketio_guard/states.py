"""State machines of process, listener, tasks, connections and deliveries.

Pure: no I/O, no clock. Each table lists every legal transition; any other event
raises an error and changes nothing.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

from .errors import InvalidTransition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class _Named(Enum):
    """An enum that prints as its value."""

    # Members are singletons. Enum's own __hash__ is written in Python, and each look-up in a
    # transition table calls it twice.
    __hash__ = object.__hash__

    def __str__(self) -> str:
        return str(self.value)


class Phase(_Named):
    """The state of a process."""

    NEW = "new"
    EMITTING = "emitting"
    """It emits or delivers, but serves no clients."""
    STARTING = "starting"
    """It is about to serve clients, or has failed to start, which is not retried."""
    SERVING = "serving"
    DRAINING = "draining"
    """Its clients are being closed, or all of them have been."""
    STOPPED = "stopped"


class PhaseEvent(_Named):
    """The events of a process."""

    EMIT = "emit"
    SERVE = "serve"
    SERVED = "served"
    """Everything that serves clients has started."""
    DRAIN = "drain"
    STOP = "stop"


class ListenerState(_Named):
    """The state of a process's message-queue listener."""

    ABSENT = "absent"
    """No message queue is configured, or a write-only process has not started to listen."""
    IDLE = "idle"
    """Not started yet."""
    STARTING = "starting"
    """Started; no probe has come back yet."""
    RUNNING = "running"
    """The latest probes came back."""
    RECONNECTING = "reconnecting"
    """The broker does not answer."""
    STALLED = "stalled"
    """The broker answers, but probes do not come back or the subscription fails."""
    STOPPED = "stopped"


class ListenerEvent(_Named):
    """The events of a listener."""

    START = "start"
    HEARD = "heard"
    """A probe came back through the listener."""
    BROKER_LOST = "broker-lost"
    PROBE_OVERDUE = "probe-overdue"
    CRASHED = "crashed"
    """The reader ended, or cannot subscribe although the broker answers."""
    STOP = "stop"


class TaskState(_Named):
    """The state of a supervised task."""

    STARTING = "starting"
    RUNNING = "running"
    BACKING_OFF = "backing-off"
    FAILED = "failed"
    """It crashed and is not restarted, by policy or because it exceeded its restart intensity."""
    FINISHED = "finished"
    STOPPED = "stopped"


class TaskEvent(_Named):
    """The events of a supervised task."""

    STARTED = "started"
    CRASHED = "crashed"
    """It ended and will be restarted."""
    RETRY = "retry"
    GAVE_UP = "gave-up"
    RETURNED = "returned"
    STOP = "stop"


class ConnectionState(_Named):
    """The state of a client's connection to a namespace."""

    CONNECTING = "connecting"
    """The connect handler has not decided yet."""
    OPEN = "open"
    """The connect handler accepted it."""
    READY = "ready"
    """The application's own handshake is complete, if it has one."""
    CLOSING = "closing"
    """It is being closed; the connect or disconnect handler may be running."""
    CLOSED = "closed"


class ConnectionEvent(_Named):
    """The events of a connection."""

    ACCEPTED = "accepted"
    """The connect handler accepted the client."""
    REFUSED = "refused"
    """The connect handler refused the client."""
    HANDSHAKE = "handshake"
    """The application's own handshake was completed."""
    CLOSE = "close"
    """Server or client closes it, or the transport is lost."""
    FINISHED = "finished"
    """The disconnect handler has run, if it had to."""


class DeliveryState(str, Enum):
    """The state of a message of acknowledged delivery; compares equal to its string value."""

    PENDING = "pending"
    """It is not in flight: the recipient is offline, or other messages are ahead of it."""
    IN_FLIGHT = "in_flight"
    """It was sent, but not acknowledged yet."""
    DELIVERED = "delivered"
    """The recipient has acknowledged it."""
    EXPIRED = "expired"
    """It was not acknowledged before its deadline."""
    GONE = "gone"
    """It was for a single connection, which has closed."""
    REFUSED = "refused"
    """The recipient acknowledged it with an error."""
    CANCELLED = "cancelled"
    """The sender cancelled it."""
    REPLACED = "replaced"
    """A newer message with the same key replaced it."""

    __hash__ = str.__hash__  # Enum's own is written in Python

    def __str__(self) -> str:
        return self.value


class DeliveryEvent(_Named):
    """The events of a message of acknowledged delivery."""

    SENT = "sent"
    RETURNED = "returned"
    """The client that it was sent to disconnected or did not acknowledge it in time."""
    ACKNOWLEDGED = "acknowledged"
    DEADLINE_PASSED = "deadline-passed"
    RECIPIENT_GONE = "recipient-gone"
    REFUSE = "refuse"
    CANCEL = "cancel"
    REPLACE = "replace"


class SendingState(_Named):
    """The state of a message that one process sends to its connections."""

    QUEUED = "queued"
    """It waits until it can be sent."""
    AWAITING = "awaiting"
    """It was sent and waits for acknowledgements; it counts against the in-flight limit."""
    SCHEDULED = "scheduled"
    """A timer will queue it again."""
    IDLE = "idle"
    """No connection of this process needs it: it is about to end, or is for other processes."""
    PARKED = "parked"
    """It has made room for other messages, and stays in the store for a while."""
    DROPPED = "dropped"
    """It has ended, or was returned to the store."""


class SendingEvent(_Named):
    """The events of a message that one process sends."""

    QUEUE = "queue"
    SEND = "send"
    SKIP = "skip"
    """It could be sent, but no connection needed it."""
    SCHEDULE = "schedule"
    SETTLED = "settled"
    """All connections that received it have acknowledged it, or one answer was enough."""
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
    # The client disconnected while its connect handler ran; the handler's decision still counts.
    (ConnectionState.CLOSING, ConnectionEvent.ACCEPTED): ConnectionState.CLOSING,
    (ConnectionState.CLOSING, ConnectionEvent.REFUSED): ConnectionState.CLOSED,
    (ConnectionState.CLOSING, ConnectionEvent.CLOSE): ConnectionState.CLOSING,
    (ConnectionState.CLOSING, ConnectionEvent.FINISHED): ConnectionState.CLOSED,
    (ConnectionState.CLOSED, ConnectionEvent.CLOSE): ConnectionState.CLOSED,
}

# Final states have no transitions: if two events would end a message, the first one wins.
DELIVERY_TRANSITIONS: Mapping[tuple[DeliveryState, DeliveryEvent], DeliveryState] = {
    (state, event): new
    for state in (DeliveryState.PENDING, DeliveryState.IN_FLIGHT)
    for event, new in (
        (DeliveryEvent.SENT, DeliveryState.IN_FLIGHT),
        (DeliveryEvent.RETURNED, DeliveryState.PENDING),
        # An acknowledgement may be late, from a client that was considered lost.
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
    # A new connection needs it.
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
    # A late acknowledgement counts, but does not change the state.
    (SendingState.QUEUED, SendingEvent.SETTLED): SendingState.QUEUED,
    (SendingState.IDLE, SendingEvent.SETTLED): SendingState.IDLE,
    (SendingState.PARKED, SendingEvent.SETTLED): SendingState.PARKED,
    (SendingState.DROPPED, SendingEvent.SETTLED): SendingState.DROPPED,
}

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class StateMachine(Generic[S, E]):
    """Holds a state and changes it only according to a transition table.

    Args:
        initial: The first state.
        transitions: The new state for every legal pair of state and event.
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
        """The current state."""
        return self._state

    def allows(self, event: E) -> bool:
        """Return whether *event* is legal in the current state."""
        return (self._state, event) in self._transitions

    def send(self, event: E, reason: str = "") -> S:
        """Apply *event* and return the new state.

        Args:
            event: What happened.
            reason: Why it happened; passed to *on_change*.

        Raises:
            InvalidTransition: The table has no such transition; nothing is changed.
        """
        old = self._state
        new = self._transitions.get((old, event))
        if new is None:
            raise InvalidTransition(old, event)
        self._state = new
        if new is not old and self._on_change is not None:
            self._on_change(old, new, reason)
        return new
