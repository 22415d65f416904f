"""Delivers records to their subscribers.

The sender is the Flask application, or the ``SocketIO`` object in a process without one.
"""

from __future__ import annotations

import logging
import sys
import weakref
from _thread import RLock
from typing import TYPE_CHECKING, Any

from ..core.forks import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from blinker import NamedSignal

    from .records.base import Record

logger = logging.getLogger("flask_socketio_guard")


class Telemetry:
    """Sends the records of one application, and subscribes to them.

    Args:
        sender: The application, or its ``SocketIO`` object.
    """

    def __init__(self, sender: object) -> None:
        self._sender = sender

    def send(self, record: Record) -> None:
        """Deliver *record* to all subscribers of its signal; see :func:`send`."""
        send(record.signal, self._sender, record)

    def subscribe(self, signal: NamedSignal, receiver: Callable[[Any], None]) -> object:
        """Call ``receiver(record)`` for every record; see :func:`subscribe`."""
        return subscribe(signal, self._sender, receiver)


class _Subscription:
    """Keeps a receiver subscribed for as long as somebody holds this object."""

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
    """Deliver *record* to every subscriber of *signal*.

    An exception of a subscriber is logged, and the remaining subscribers are called.
    """
    # The guard's own subscribers bypass blinker, which costs more for each record than they do.
    try:
        by_signal = _subscribers.get(sender)
    except TypeError:  # the sender has no weak references, see subscribe()
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
        The subscription, which ends when this object is dropped: a signal must not
        keep a discarded application alive.
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
