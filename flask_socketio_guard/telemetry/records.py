"""What happens in a guarded process: one signal and one record for each kind of fact.

Log lines, counters, health and hooks of the application are subscribers; the
code that notices a fact knows none of them. The sender is the Flask application,
or the ``SocketIO`` object in a process without one.
"""

from __future__ import annotations

import logging
import secrets
import sys
import weakref
from _thread import RLock
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from blinker import NamedSignal, Namespace

from ..core.forks import renew_after_fork
from ..errors import EventRejected, HandlerTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..states import ConnectionState, DeliveryState, ListenerState, TaskState

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
connection_changed: NamedSignal = _signals.signal("connection-changed")
"""A :class:`ConnectionChange`."""
handshake_refused: NamedSignal = _signals.signal("handshake-refused")
"""A :class:`HandshakeRefusal`: a client was not let in, before any handler ran."""
protocol_violated: NamedSignal = _signals.signal("protocol-violated")
"""A :class:`Violation`: a client sent what the protocols do not allow."""
send_lost: NamedSignal = _signals.signal("send-lost")
"""A :class:`SendLoss`: messages to a client were dropped."""
message_repeated: NamedSignal = _signals.signal("message-repeated")
"""A :class:`Repetition`: a message of another process came again, and was dropped."""
connections_swept: NamedSignal = _signals.signal("connections-swept")
"""A :class:`Sweep`: leftovers of connections were removed."""
delivery_ended: NamedSignal = _signals.signal("delivery-ended")
"""A :class:`DeliveryEnd`: a message that must arrive was acknowledged or given up."""
delivery_store_changed: NamedSignal = _signals.signal("delivery-store-changed")
"""A :class:`BrokerChange` of the store of such messages."""
deliveries_abandoned: NamedSignal = _signals.signal("deliveries-abandoned")
"""A :class:`DeliveryLoss`: this process ends, and with it what is in its memory."""
loop_blocked: NamedSignal = _signals.signal("loop-blocked")
"""A :class:`LoopBlock`: something kept the event loop from running."""


LISTENER_TASK: Final = "socketio-guard:listener"
"""Name of the task that reads the message queue; its restarts are counted apart."""


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
        exception: What the handler raised, where an error handler or an overridden
            ``trigger_event`` of the application has answered it; such is no :class:`Failure`.
        error_id: Told to the client with it.
    """

    event: str
    namespace: str
    sid: str | None
    error: EventRejected
    exception: Exception | None = None
    error_id: str = ""


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
    """A server stopped answering, or answers again: the message queue, or a store.

    Attributes:
        is_reachable: The state from now on.
        reason: The driver's words when it went away.
        duration: Seconds it was away, when it came back.
        is_refusing: Whether it will not have this process, and waiting does not mend that.
    """

    is_reachable: bool
    reason: str = ""
    duration: float = 0.0
    is_refusing: bool = False


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


@dataclass(frozen=True)
class ConnectionChange:
    """A client's connection to a namespace moved from *old* to *new*.

    Attributes:
        sid: Session id of the client in the namespace.
        namespace: Socket.IO namespace.
        old: ``None`` for a connection that is new.
        new: The state from now on.
        reason: Why it closes; empty otherwise.
    """

    sid: str
    namespace: str
    old: ConnectionState | None
    new: ConnectionState
    reason: str = ""


@dataclass(frozen=True)
class HandshakeRefusal:
    """A client was refused before a session was made for it.

    Attributes:
        reason: ``"full"``, ``"address"`` (too many from one), ``"rate"``,
            ``"unjoined"`` (had joined nothing and went for a new one), ``"application"`` (its
            connect handler refused it), ``"draining"``, ``"upgrade"`` (odd headers),
            ``"session"`` (over, or none), ``"elsewhere"`` (its session was never in this process),
            ``"origin"``, ``"version"`` or ``"request"`` (anything else that is wrong with it).
        detail: For people; never what the client sent.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Repetition:
    """A message of another process came a second time, and was acted on once.

    Attributes:
        host_id: Name of that process on the message queue.
        sequence: Its number among the messages of that process.
    """

    host_id: str
    sequence: int


@dataclass(frozen=True)
class Violation:
    """A client broke the protocol, which costs it its connection.

    Attributes:
        reason: ``"websocket"``, ``"size"`` (in bytes, or in lists and objects),
            ``"packet"`` (undecodable), ``"payload"`` (of a polling request) or
            ``"attachments"`` or ``"connects"`` (too many CONNECT packets).
        detail: For people; at most 200 characters.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class SendLoss:
    """Messages to one client were dropped.

    Attributes:
        count: How many.
        reason: ``"slow"`` (its queue is full), ``"volatile"`` (it did not keep
            up, and they were volatile) or ``"closed"`` (it is gone).
    """

    count: int
    reason: str


@dataclass(frozen=True)
class Sweep:
    """Leftovers of connections that are gone were removed.

    Attributes:
        count: How many entries.
        tables: Where they were found.
    """

    count: int
    tables: tuple[str, ...]


@dataclass(frozen=True)
class DeliveryEnd:
    """A message that must arrive has come to its end, by this process.

    Attributes:
        id: Of the message.
        recipient: Session id, room or identity.
        event: Name of the event.
        state: How it ended.
        attempts: How often it was sent.
    """

    id: str
    recipient: str
    event: str
    state: DeliveryState
    attempts: int


@dataclass(frozen=True)
class DeliveryLoss:
    """Deliveries end with the process in whose memory they are.

    Attributes:
        count: How many.
    """

    count: int


@dataclass(frozen=True)
class LoopBlock:
    """The event loop could not run.

    Attributes:
        place: ``file:line in function`` that blocked.
        stack: The stack at that instant, as text.
        duration: Seconds; ``None`` while it is still going on.
    """

    place: str
    stack: str
    duration: float | None = None


class Telemetry:
    """What happens, on its way to the signals: one method for each kind of record.

    Args:
        sender: The application.
    """

    def __init__(self, sender: object) -> None:
        self._sender = sender

    def subscribe(self, signal: NamedSignal, receiver: Callable[[Any], None]) -> object:
        """Call ``receiver(record)`` for every record; see :func:`subscribe`."""
        return subscribe(signal, self._sender, receiver)

    def failed(
        self,
        kind: str,
        exc: BaseException,
        name: str = "",
        namespace: str | None = None,
        sid: str | None = None,
    ) -> None:
        """Code raised where the guard caught it; see :class:`Failure`."""
        send(failed, self._sender, Failure(kind, exc, name, namespace, sid))

    def task_changed(self, name: str, old: TaskState, new: TaskState, reason: str) -> None:
        """A supervised task has moved on."""
        send(task_changed, self._sender, TaskChange(name, old, new, reason))

    def connection_changed(
        self,
        sid: str,
        namespace: str,
        old: ConnectionState | None,
        new: ConnectionState,
        reason: str,
    ) -> None:
        """A client's connection has moved on."""
        change = ConnectionChange(sid, namespace, old, new, reason)
        send(connection_changed, self._sender, change)

    def connections_swept(self, removed: Mapping[str, int]) -> None:
        """Leftovers were removed, so many from each table."""
        record = Sweep(sum(removed.values()), tuple(removed))
        send(connections_swept, self._sender, record)

    def callback_lost(self, reason: str, recipient: object) -> None:
        """A callback was dropped without being called."""
        send(callback_lost, self._sender, CallbackLoss(reason, recipient))

    def listener_changed(self, old: ListenerState, new: ListenerState, reason: str) -> None:
        """The listener has moved on."""
        send(listener_changed, self._sender, ListenerChange(old, new, reason))

    def broker_changed(
        self, is_reachable: bool, reason: str, duration: float, *, is_refusing: bool
    ) -> None:
        """The broker of the message queue stopped answering, or answers again."""
        change = BrokerChange(is_reachable, reason, duration, is_refusing)
        send(broker_changed, self._sender, change)

    def outbox_lost(self, count: int, reason: str, detail: str) -> None:
        """Messages to other processes were dropped."""
        send(outbox_lost, self._sender, OutboxLoss(count, reason, detail))

    def delivery_store_changed(self, is_reachable: bool, reason: str, duration: float) -> None:
        """The store of deliveries stopped answering, or answers again."""
        change = BrokerChange(is_reachable, reason, duration)
        send(delivery_store_changed, self._sender, change)

    def deliveries_abandoned(self, count: int) -> None:
        """Deliveries end with this process, because they are in its memory."""
        send(deliveries_abandoned, self._sender, DeliveryLoss(count))

    def delivery_ended(self, end: DeliveryEnd) -> None:
        """A delivery has come to its end."""
        send(delivery_ended, self._sender, end)

    def handshake_refused(self, reason: str, detail: str = "") -> None:
        """A client was refused before a session was made for it."""
        send(handshake_refused, self._sender, HandshakeRefusal(reason, detail))

    def protocol_violated(self, reason: str, detail: str = "") -> None:
        """A client broke the protocol."""
        send(protocol_violated, self._sender, Violation(reason, detail))

    def send_lost(self, count: int, reason: str) -> None:
        """Messages to one client were dropped."""
        send(send_lost, self._sender, SendLoss(count, reason))

    def message_repeated(self, host_id: str, sequence: int) -> None:
        """A message of another process was dropped, because it has been acted on."""
        send(message_repeated, self._sender, Repetition(host_id, sequence))


class _Subscription:
    """What keeps a subscriber subscribed."""

    __slots__ = ("__weakref__", "receiver")

    def __init__(self, receiver: Callable[[Any], None]) -> None:
        self.receiver = receiver


_References = tuple["weakref.ref[_Subscription]", ...]
_subscribers: weakref.WeakKeyDictionary[object, dict[NamedSignal, _References]] = (
    weakref.WeakKeyDictionary()
)
_lock = RLock()  # a subscription may be dropped while another one is made
renew_after_fork(sys.modules[__name__], _lock=RLock)


def send(signal: NamedSignal, sender: object, record: object) -> None:
    """Hand *record* to every subscriber of *signal*, whatever the others do.

    A subscriber that raises is logged and does not keep the rest from hearing.
    """
    # Those of the guard are not with blinker, which spends more on each record than they do.
    try:
        by_signal = _subscribers.get(sender)
    except TypeError:  # it has no weak references, see subscribe()
        by_signal = None
    if by_signal is not None:
        for reference in by_signal.get(signal, ()):
            subscription = reference()
            if subscription is not None:
                try:
                    subscription.receiver(record)
                except BaseException:
                    logger.exception("a subscriber of %r raised", signal.name)
    if not signal.receivers:
        return
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
    try:
        by_signal = _subscribers.setdefault(sender, {})
    except TypeError:

        def adapter(_sender: object, *, record: object) -> None:
            receiver(record)

        signal.connect(adapter, sender=sender)
        return adapter
    subscription = _Subscription(receiver)

    def forget(dropped: weakref.ref[_Subscription]) -> None:
        with _lock:
            rest = tuple(known for known in by_signal[signal] if known is not dropped)
            by_signal[signal] = rest

    with _lock:
        by_signal[signal] = (*by_signal.get(signal, ()), weakref.ref(subscription, forget))
    return subscription
