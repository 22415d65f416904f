"""What happens in a guarded process: one signal and one record for each kind of fact.

Log lines, counters, health and hooks of the application are subscribers; the
code that notices a fact knows none of them. The sender is the Flask application,
or the ``SocketIO`` object in a process without one.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blinker import NamedSignal, Namespace

from .errors import EventRejected, HandlerTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import ListenerState, TaskState

logger = logging.getLogger("flask_socketio_guard")

_signals = Namespace()

failed: NamedSignal = _signals.signal("failed")
"""A :class:`Failure`: code of the application, or of the guard, raised."""
rejected: NamedSignal = _signals.signal("rejected")
"""A :class:`Rejection`: an event was refused before or by its handler."""
callback_lost: NamedSignal = _signals.signal("callback-lost")
"""A :class:`CallbackLoss`: an acknowledgement callback will never be called."""
listener_changed: NamedSignal = _signals.signal("listener-changed")
"""A :class:`ListenerChange`."""
broker_changed: NamedSignal = _signals.signal("broker-changed")
"""A :class:`BrokerChange`: the message queue went away or came back."""
outbox_lost: NamedSignal = _signals.signal("outbox-lost")
"""An :class:`OutboxLoss`: messages to other processes were dropped."""
task_changed: NamedSignal = _signals.signal("task-changed")
"""A :class:`TaskChange`."""


def _new_error_id() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Failure:
    """Code raised where the guard caught it.

    Attributes:
        kind: ``"handler"``, ``"callback"``, ``"task"``, ``"hook"`` or ``"listener"``.
        exception: What was raised, with its traceback.
        name: The event, task or function that failed.
        namespace: Socket.IO namespace, where there is one.
        sid: Session id of the client concerned, where there is one.
        error_id: 16 hex digits, told to the client and written to the log.
    """

    kind: str
    exception: BaseException
    name: str = ""
    namespace: str | None = None
    sid: str | None = None
    error_id: str = field(default_factory=_new_error_id)

    @property
    def code(self) -> str:
        """The code that a client sees: ``"timeout"`` or ``"internal_error"``."""
        return "timeout" if isinstance(self.exception, HandlerTimeout) else "internal_error"


@dataclass(frozen=True)
class Rejection:
    """An event was refused.

    Attributes:
        event: Name of the event as the client sent it, cut to 100 characters.
        namespace: Socket.IO namespace.
        sid: Session id of the sender.
        error: The refusal, with code and message.
    """

    event: str
    namespace: str
    sid: str | None
    error: EventRejected


@dataclass(frozen=True)
class CallbackLoss:
    """An acknowledgement callback was dropped without being called.

    Attributes:
        reason: ``"expired"`` (its deadline passed), ``"gone"`` (the client is
            gone) or ``"stopped"`` (the process is stopping).
        recipient: Session id or room that the event was sent to.
    """

    reason: str
    recipient: object


@dataclass(frozen=True)
class ListenerChange:
    """The listener moved from *old* to *new*."""

    old: ListenerState
    new: ListenerState
    reason: str


@dataclass(frozen=True)
class BrokerChange:
    """The message queue stopped answering, or answers again.

    Attributes:
        is_reachable: The state from now on.
        reason: The driver's words when it went away.
        duration: Seconds it was away, when it came back.
    """

    is_reachable: bool
    reason: str = ""
    duration: float = 0.0


@dataclass(frozen=True)
class OutboxLoss:
    """Messages to other processes were dropped.

    Attributes:
        count: How many.
        reason: ``"overflow"``, ``"refused"`` (by the broker) or ``"exit"``.
        detail: The broker's words, where there are any.
    """

    count: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class TaskChange:
    """A supervised task moved from *old* to *new*."""

    name: str
    old: TaskState
    new: TaskState
    reason: str


def send(signal: NamedSignal, sender: object, record: object) -> None:
    """Hand *record* to every subscriber of *signal*, whatever the others do.

    A subscriber that raises is logged and does not keep the rest from hearing.
    """
    for receiver in signal.receivers_for(sender):
        try:
            receiver(sender, record=record)
        except BaseException:
            logger.exception("a subscriber of %r raised", signal.name)


def subscribe(signal: NamedSignal, sender: object, receiver: Callable[[Any], None]) -> object:
    """Call ``receiver(record)`` for every record of *sender*.

    Returns:
        The subscription. It ends when this object is dropped, so that a
        discarded application is not kept alive by a signal.
    """

    def adapter(_sender: object, *, record: object) -> None:
        receiver(record)

    signal.connect(adapter, sender=sender)
    return adapter
