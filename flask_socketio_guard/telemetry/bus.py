"""The way of a record to those who listen.

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
    """What happens in one application, on its way to the signals.

    Args:
        sender: The application.
    """

    def __init__(self, sender: object) -> None:
        self._sender = sender

    def send(self, record: Record) -> None:
        """Hand *record* to all that listen to its kind."""
        send(record.signal, self._sender, record)

    def subscribe(self, signal: NamedSignal, receiver: Callable[[Any], None]) -> object:
        """Call ``receiver(record)`` for every record; see :func:`subscribe`."""
        return subscribe(signal, self._sender, receiver)


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
