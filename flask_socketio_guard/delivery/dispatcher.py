"""Sends messages to the connections of this process until they are acknowledged.

The store has the messages, :mod:`.presence` knows which recipients are connected here,
:mod:`.mailboxes` hold the messages that are loaded for them. The dispatcher sends and redelivers
these. It never waits.
"""

from __future__ import annotations

import math
from _thread import RLock
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..backoff import backoff_delay
from ..checks import is_text
from ..core.runtime import clock
from ..events.acknowledgements import Question, Recipients
from ..states import DeliveryState, SendingEvent, SendingState
from .mailboxes import Mailboxes
from .presence import Members, Presence
from .records import address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from ..core.deadlines import Deadlines
    from .mailboxes import Mailbox, PendingMessage
    from .records import Delivery
    from .store_client import StoreClient

_REGROUPING_TIME: Final = 0.02  # seconds until other devices get what one has left behind
_LONGEST_REGROUPING_TIME: Final = 1.0  # seconds

# Each message needs these several times, and a member of an enum is slow to look up.
_QUEUED: Final = SendingState.QUEUED
_AWAITING: Final = SendingState.AWAITING
_SEND: Final = SendingEvent.SEND
_SETTLED: Final = SendingEvent.SETTLED

_NOT_LACKED: Final = (_QUEUED, SendingState.DROPPED)
"""A new connection need not be sent these: they have yet to be sent, or have been dropped."""


class Connections(Members, Recipients, Protocol):
    """The clients of this process, and the way to them."""

    def forget(self, ack_id: int, sid: str) -> None:
        """Stop waiting for an acknowledgement of :meth:`ask`."""


class _Attempt:
    """One attempt to send a message to one client, whose acknowledgement is awaited."""

    __slots__ = ("_dispatcher", "_mailbox", "_pending", "_sid")

    timeout = 1e9  # seconds; attempts are forgotten with their message
    is_inline = True

    def __init__(
        self, dispatcher: Dispatcher, mailbox: Mailbox, pending: PendingMessage, sid: str
    ) -> None:
        self._dispatcher = dispatcher
        self._mailbox = mailbox
        self._pending = pending
        self._sid = sid

    def function(self, *answer: Any) -> None:
        self._dispatcher.answered(self._mailbox, self._pending, self._sid, answer)

    def on_lost(self, reason: str) -> None:
        self._dispatcher.lost(self._mailbox, self._pending, self._sid, reason)


class Dispatcher:
    """Sends and redelivers messages to the clients of this process.

    To be used on the thread of the event loop, where there is one, and else on any.

    Args:
        store_client: The way to the store. No end is reported to it while the lock is held,
            because it may call back.
        connections: The clients.
        deadlines: For timeouts.
        max_in_flight: Messages to one recipient that may be unacknowledged at a time, >= 1.
        backoff: Returns a delay, as :func:`~flask_socketio_guard.backoff.backoff_delay`.

    Attributes:
        presence: The recipients that are connected here, and those that have left.
    """

    def __init__(
        self,
        store_client: StoreClient,
        connections: Connections,
        deadlines: Deadlines,
        *,
        max_in_flight: int,
        backoff: Callable[..., float] = backoff_delay,
    ) -> None:
        self._lock = lock = RLock()  # never held during a wait
        self._store_client = store_client
        self._connections = connections
        self._deadlines = deadlines
        self._backoff = backoff
        self.presence = Presence(connections, deadlines, lock, max_in_flight=max_in_flight)
        self._mailboxes = Mailboxes(
            store_client.load,
            self.presence,
            deadlines,
            lock,
            max_in_flight=max_in_flight,
            forget=connections.forget,
            on_loaded=self._pump,
        )
        self._move = self._mailboxes.move

    @property
    def in_flight(self) -> int:
        """How many messages await an acknowledgement here."""
        return self._mailboxes.in_flight

    # Recipients that connect and leave

    def identify(self, sid: str, namespace: str, identity: str) -> None:
        """Note that a client is a device of *identity*, from now until it leaves."""
        address = address_of(namespace, identity)
        with self._lock:
            is_name = is_text(namespace) and is_text(identity)
            if not is_name or not self._connections.is_here(sid):
                return
            if self.presence.identify(sid, address):
                self._store_client.join(address, sid)
            self.recipient_online(identity, namespace)

    def join_again(self) -> None:
        """Announce all devices to the store again: it may have forgotten them."""
        with self._lock:
            for address, sid in self.presence.devices():
                self._store_client.join(address, sid)

    def session_opened(self, sid: str, namespace: str) -> None:
        """Send what waits for a client that has been let in."""
        with self._lock:
            for address in self.presence.addresses_of(sid):
                self.recipient_online(address.partition(",")[2], namespace)
            if self.presence.stop_awaiting(sid):
                self.recipient_online(sid, namespace)

    def recipient_online(self, recipient: str, namespace: str) -> None:
        """Send what waits for a recipient that has one more connection here."""
        if not is_text(recipient) or not is_text(namespace):  # no message can be for it
            return
        with self._lock:
            mailbox = self._mailboxes.open(address_of(namespace, recipient))
            self._send_missing(mailbox)
            self._mailboxes.load(mailbox)

    def session_closed(self, sid: str, namespace: str, transport: str | None = None) -> None:
        """Note that a client has left.

        Args:
            sid: Of the client.
            namespace: Socket.IO namespace.
            transport: The name of its transport, unless that has ended, too.
        """
        address = address_of(namespace, sid)
        with self._lock:
            left = self.presence.leave(sid, transport)
            mailbox = self._mailboxes.get(address)
            if mailbox is not None:
                self._close(mailbox)
            is_awaited = self.presence.stop_awaiting(sid) or mailbox is not None
        for each in left:
            self._store_client.leave(each, sid)
        if is_awaited:
            # No other client will ever have this session id.
            self._store_client.fail_all(address, DeliveryState.GONE)

    # What the store has for them

    def look_again(self, recipients: Iterable[tuple[str, str]] = ()) -> None:
        """Look up all messages for recipients here: some may have been missed.

        Args:
            recipients: Session ids and rooms of connected clients, with their namespaces.
        """
        with self._lock:
            for recipient, namespace in recipients:
                if is_text(recipient) and is_text(namespace):
                    self._mailboxes.open(address_of(namespace, recipient))
            for address in self.presence.identities():
                self._mailboxes.open(address)
            self._mailboxes.look_again()

    def offer(self, delivery: Delivery) -> None:
        """Send a message that was stored just now, if its recipient is connected here."""
        with self._lock:
            if delivery.recipient not in self.presence.departed:
                mailbox = self._mailboxes.add(delivery)
                if mailbox is not None:
                    self._pump(mailbox)
                return
        self._store_client.fail_all(delivery.address, DeliveryState.GONE)

    def stored(self, address: str) -> None:
        """Load messages that others have just stored, if their recipient is connected here."""
        with self._lock:
            if address.partition(",")[2] not in self.presence.departed:
                self._mailboxes.look_for_more(address)
                return
        self._store_client.fail_all(address, DeliveryState.GONE)

    def ended(self, delivery: Delivery) -> None:
        """Forget a message that has ended, wherever that was."""
        with self._lock:
            mailbox = self._mailboxes.end(delivery)
            if mailbox is not None:
                self._pump(mailbox)

    # Sending

    def _pump(self, mailbox: Mailbox) -> None:
        """Send what may be sent now."""
        if not mailbox.is_open:
            return
        ready, line = mailbox.ready, mailbox.line
        while ready and (not mailbox.in_flight or self._mailboxes.has_room(mailbox, ready[0])):
            if not self._send(mailbox, ready.popleft()):
                return
        has_turn = line and line[0].state is _QUEUED and self._mailboxes.has_room(mailbox, line[0])
        if has_turn and not self._send(mailbox, line[0]):
            return
        is_idle = not mailbox.is_loading and not mailbox.has_more and mailbox.restart is None
        if is_idle and not mailbox.pending_messages:
            self._mailboxes.take_away(mailbox)

    def _send(self, mailbox: Mailbox, pending: PendingMessage, *, but: Container[str] = ()) -> bool:
        """Send a message to all its recipients *but* some; return whether any is connected."""
        now = clock()
        if pending.is_answered or now >= pending.deadline:  # it is about to end
            self._move(mailbox, pending, SendingEvent.SKIP)
            return True
        present = self.presence.find(mailbox)
        if not present:
            self._close(mailbox)
            return False
        lacking = [sid for sid in present if sid not in pending.acknowledged and sid not in but]
        if not lacking:  # others have yet to acknowledge it
            self._move(mailbox, pending, SendingEvent.SKIP)
            return True
        if self.presence.owed:
            barred = {sid: self.presence.barred_until(sid, pending.delivery.id) for sid in lacking}
            lacking = [sid for sid, until in barred.items() if not until]
            if not lacking:
                delay = max(_REGROUPING_TIME, min(barred.values()) - now)
                self._send_later(mailbox, pending, delay)
                return True
        pending.attempts += 1
        self._move(mailbox, pending, _SEND)
        pending.due_at = due_at = now + pending.delivery.retry.ack_timeout
        if due_at < mailbox.looks_at:
            self._look_at(mailbox, due_at)
        for sid in lacking:
            self._hand(mailbox, pending, sid)
        if pending.holders:
            pending.misses = 0
            self._store_client.sent(pending.delivery.id)
        elif pending.state is not SendingState.DROPPED:  # they are about to leave
            pending.attempts -= 1
            pending.misses += 1
            delay = min(_REGROUPING_TIME * 2 ** min(pending.misses, 9), _LONGEST_REGROUPING_TIME)
            self._send_later(mailbox, pending, delay)
        return True

    def _send_later(self, mailbox: Mailbox, pending: PendingMessage, delay: float) -> None:
        self._move(mailbox, pending, SendingEvent.SCHEDULE)
        due = partial(self._due, mailbox, pending)
        pending.timer = self._deadlines.call_later(delay, due)

    def _due(self, mailbox: Mailbox, pending: PendingMessage) -> None:
        with self._lock:
            # A timer may be cancelled while it waits for the lock.
            if pending.state is SendingState.SCHEDULED:
                self._mailboxes.queue(mailbox, pending)
                self._pump(mailbox)

    def _look_at(self, mailbox: Mailbox, at: float) -> None:
        # One timer for all, which outlives most of what it was set for.
        if mailbox.look is not None:
            mailbox.look.cancel()
        mailbox.looks_at = at
        mailbox.look = self._deadlines.call_later(
            max(0.0, at - clock()), partial(self._overdue, mailbox)
        )

    def _overdue(self, mailbox: Mailbox) -> None:
        """Treat the attempts that were not acknowledged in time as lost."""
        with self._lock:
            mailbox.look, mailbox.looks_at = None, math.inf
            now = clock()
            waiting = [
                pending
                for pending in mailbox.pending_messages.values()
                if pending.state is _AWAITING
            ]
            later = [pending.due_at for pending in waiting if pending.due_at > now]
            if later:
                self._look_at(mailbox, min(later))
            for pending in waiting:
                if pending.state is _AWAITING and pending.due_at <= now:
                    self._unanswered(mailbox, pending)

    def _hand(self, mailbox: Mailbox, pending: PendingMessage, sid: str) -> None:
        delivery = pending.delivery
        arguments = delivery.body
        if delivery.has_id:
            comma = "" if arguments == "[]" else ","
            known_by = f'{{"delivery_id":"{delivery.id}","attempt":{pending.attempts}}}'
            arguments = f"{arguments[:-1]}{comma}{known_by}]"
        callback = _Attempt(self, mailbox, pending, sid)
        # An answer to any of several attempts acknowledges the message.
        before = pending.holders.get(sid)
        question = Question(mailbox.namespace, delivery.event, arguments, callback, before)
        ack_id = self._connections.ask(sid, question)
        if ack_id is None:
            pending.holders.pop(sid, None)
        else:
            pending.holders[sid] = ack_id

    def answered(
        self, mailbox: Mailbox, pending: PendingMessage, sid: str, answer: tuple[Any, ...]
    ) -> None:
        """Act on an acknowledgement."""
        is_refused = is_refusal(answer)
        with self._lock:
            pending.holders.pop(sid, None)
            if is_refused:
                pending.is_refused = True
            else:
                pending.acknowledged |= {sid}
            if not pending.holders or pending.is_answered:
                # At most acknowledgements of other devices are missing.
                self._move(mailbox, pending, _SETTLED)
        if is_refused:
            self._store_client.give_up(pending.delivery, DeliveryState.REFUSED)
        else:
            self._store_client.acknowledged(pending.delivery, sid)

    def lost(self, mailbox: Mailbox, pending: PendingMessage, sid: str, reason: str) -> None:
        """Note that no acknowledgement will come."""
        with self._lock:
            if reason != "gone" or pending.holders.pop(sid, None) is None:
                return
            self._owe_for(pending, sid)
            if pending.state is _AWAITING and not pending.holders:
                # Not at once: a process that loses its clients one by one gets here for each.
                self._store_client.returned(pending.delivery.id)
                self._send_later(mailbox, pending, _REGROUPING_TIME)

    def _owe_for(self, pending: PendingMessage, sid: str) -> None:
        """Note that a client has left with a message that it has not acknowledged."""
        is_awaited = pending.state is _AWAITING and not pending.is_answered
        if is_awaited and sid not in pending.acknowledged:
            self.presence.owe(sid, pending.delivery.id, pending.due_at)

    def _unanswered(self, mailbox: Mailbox, pending: PendingMessage) -> None:
        self._store_client.returned(pending.delivery.id)
        if self._mailboxes.has_to_park(mailbox, pending):
            self._mailboxes.park(mailbox, pending)
        else:
            retry = pending.delivery.retry
            delay = self._backoff(
                pending.attempts - 1, first_delay=retry.first_delay, max_delay=retry.max_delay
            )
            self._send_later(mailbox, pending, delay)
        self._mailboxes.load(mailbox)
        self._pump(mailbox)

    def _send_missing(self, mailbox: Mailbox) -> None:
        """Send a new connection what others have been sent, and what no client has."""
        present = self.presence.find(mailbox)
        if self.presence.owed:
            present = [sid for sid in present if not self.presence.barred_until(sid)]
        for pending in list(mailbox.pending_messages.values()) if present else ():
            if pending.is_answered or pending.state in _NOT_LACKED:
                continue
            lacking = [
                sid
                for sid in present
                if sid not in pending.holders and sid not in pending.acknowledged
            ]
            if pending.state is _AWAITING:
                for sid in lacking:
                    if not self._is_barred(sid, pending):
                        self._hand(mailbox, pending, sid)
            elif lacking and not self._mailboxes.has_room(mailbox, pending):
                self._mailboxes.queue(mailbox, pending)
            elif lacking:
                self._send(mailbox, pending, but=set(pending.holders))
        self._pump(mailbox)

    def _is_barred(self, sid: str, pending: PendingMessage) -> bool:
        presence = self.presence
        return bool(presence.owed and presence.barred_until(sid, pending.delivery.id))

    def _close(self, mailbox: Mailbox) -> None:
        """Return the messages of a recipient that is no longer connected here to the store."""
        for pending in mailbox.pending_messages.values():
            if pending.state is _AWAITING:
                for sid in pending.holders:
                    self._owe_for(pending, sid)
                self._store_client.returned(pending.delivery.id)
        self._mailboxes.close(mailbox)


def is_refusal(answer: tuple[Any, ...]) -> bool:
    """Return whether an acknowledgement refuses the message.

    Such an acknowledgement is an object with a key ``error``, as the guard's own errors are.
    """
    return len(answer) == 1 and isinstance(answer[0], dict) and bool(answer[0].get("error"))
