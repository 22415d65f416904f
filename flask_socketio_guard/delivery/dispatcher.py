"""Brings messages to the connections of this process until they are acknowledged.

The store knows what there is; the dispatcher knows who is here, what is on its way, and when
it is to be sent again. It never waits.
"""

from __future__ import annotations

import math
from _thread import RLock
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..backoff import backoff_delay
from ..checks import is_text
from ..core.runtime import clock
from ..states import DeliveryState
from .records import address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from ..ports import Awaiting, Deadlines, Timer
    from .records import Delivery
    from .store import Page
    from .store_client import StoreClient

_WINDOW: Final = 128
"""Messages to one recipient that are known here; the rest stay in the store until their turn."""

_WINDOW_SIZE: Final = 1024 * 1024
"""Bytes of their bodies, and of those that one recipient has and has not acknowledged."""

_MIN_OWED: Final = 16  # what a transport may owe at least
_VISIT_TIME: Final = 10.0  # seconds for which it counts that somebody has left and may be back
_MAX_PARKED: Final = 512  # messages to one recipient whose late acknowledgement still counts
_MAX_REMEMBERED: Final = 10_000  # connections and messages that are no more
_REGROUPING_TIME: Final = 0.02  # seconds until those that remain get what others left behind
_LONGEST_REGROUPING_TIME: Final = 1.0  # seconds


class Connections(Protocol):
    """The clients of this process, and how to reach them."""

    def find(self, recipient: str, namespace: str) -> list[str]:
        """Return those who have that session id, or are in that room; in a list of one's own."""

    def is_open(self, sid: str) -> bool:
        """Say whether a client is let in, and not leaving."""

    def is_here(self, sid: str) -> bool:
        """Say whether a client is here; it may not be let in yet, or be leaving."""

    def transport_of(self, sid: str) -> str | None:
        """Return what the transport of a client is known by; ``None`` if that has ended."""

    def ask(
        self,
        sid: str,
        namespace: str,
        event: str,
        arguments: str,
        callback: Awaiting,
        ack_id: int | None = None,
    ) -> int | None:
        """Send an event to one client that is to acknowledge it.

        Args:
            sid: Of the client.
            namespace: Socket.IO namespace.
            event: Its name.
            arguments: JSON text of a list.
            callback: Called with the acknowledgement.
            ack_id: What an earlier one returned, whose callback shall have the answer instead.

        Returns:
            What :meth:`forget` takes; ``None`` if the client is gone.
        """

    def forget(self, ack_id: int, sid: str) -> None:
        """Wait for that acknowledgement no longer."""


@dataclass(slots=True, eq=False)
class _PendingMessage:
    """A message on its way to the connections of this process."""

    delivery: Delivery
    deadline: float
    attempts: int
    size: int  # of its body
    # Who has it and has not acknowledged it, and what that acknowledgement is known by.
    holders: dict[str, int] = field(default_factory=dict)
    acknowledged: frozenset[str] = frozenset()
    timer: Timer | None = None  # until it is sent again
    is_waiting: bool = False  # for an acknowledgement, and so takes a place of the bound
    due_at: float = 0.0  # when that is over
    is_queued: bool = False  # for its turn
    is_refused: bool = False
    misses: int = 0  # how often in a row all those present were about to leave

    @property
    def is_answered(self) -> bool:
        """Whether there is nothing left but to tell the store."""
        if self.is_refused:
            return True
        return bool(self.acknowledged) and not self.delivery.requires_all


@dataclass(slots=True, eq=False)
class _Mailbox:
    """What is known here of one recipient's messages."""

    address: str
    has_more: bool  # in the store than is known here
    namespace: str = ""
    recipient: str = ""
    pending_messages: dict[str, _PendingMessage] = field(default_factory=dict)
    ready: deque[_PendingMessage] = field(default_factory=deque)
    line: deque[_PendingMessage] = field(
        default_factory=deque
    )  # the ordered ones; the first has its turn
    size: int = 0  # of the bodies of its pending_messages
    in_flight: int = 0
    in_flight_size: int = 0  # of their bodies
    looks_at: float = math.inf  # when some of them are overdue
    look: Timer | None = None
    last: int = 0  # the number of the newest message that came from the store
    round: int = 0  # how often the store was looked through from the beginning
    is_loading: bool = False
    is_stale: bool = False  # something was stored since what is being loaded was asked for
    suspects: set[str] = field(default_factory=set)  # may have ended without our hearing of it
    parked: dict[str, _PendingMessage] = field(
        default_factory=dict
    )  # out of the way of others, for a while
    revisit_after: float = 0.0  # seconds until parked messages are looked for; 0: there are none
    restart: Timer | None = None

    def __post_init__(self) -> None:
        self.namespace, _, self.recipient = self.address.partition(",")


class _Attempt:
    """A message in the hands of one client, whose acknowledgement is awaited."""

    __slots__ = ("_dispatcher", "_mailbox", "_pending", "_sid")

    timeout = 1e9  # seconds; a message that ends is forgotten, and so is whom it was for
    is_inline = True

    def __init__(
        self, dispatcher: Dispatcher, mailbox: _Mailbox, pending: _PendingMessage, sid: str
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
    """The messages on their way to clients of this process.

    To be used at home only; there, from any task or thread.

    Args:
        store_client: The way to the store. It is never told of an end while the lock is held,
            because it may tell others of it.
        connections: The clients.
        deadlines: For timeouts.
        max_in_flight: Messages to one recipient that may be unacknowledged at a time, >= 1.
        backoff: Returns a delay, as :func:`~flask_socketio_guard.backoff.backoff_delay`.
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
        self._lock = RLock()  # nobody waits while holding it
        self._store_client = store_client
        self._connections = connections
        self._deadlines = deadlines
        self._max_in_flight = max_in_flight
        self._backoff = backoff
        self._in_flight = 0
        self._mailboxes: dict[str, _Mailbox] = {}
        self._identities: dict[str, set[str]] = {}
        self._addresses: dict[str, list[str]] = {}  # of the identities of a client
        self._awaited: set[str] = set()  # clients that the store may have something for
        self._departed: OrderedDict[str, str | None] = OrderedDict()  # with their transports
        # Messages that a transport left unacknowledged, and session ids that it left, each with
        # its expiry: a client that leaves a namespace and joins again is not resent everything.
        self._owed: dict[str, dict[str, float]] = {}
        self._max_owed = max(_MIN_OWED, max_in_flight)
        self._done: OrderedDict[str, str | None] = OrderedDict()

    @property
    def in_flight(self) -> int:
        """How many messages wait for an acknowledgement here."""
        return self._in_flight

    # Who is here

    def identify(self, sid: str, namespace: str, identity: str) -> None:
        """Note that a client is a device of *identity*, from now until it leaves."""
        address = address_of(namespace, identity)
        with self._lock:
            is_name = is_text(namespace) and is_text(identity)
            if not is_name or not self._connections.is_here(sid):
                return
            devices = self._identities.setdefault(address, set())
            if sid not in devices:
                devices.add(sid)
                self._addresses.setdefault(sid, []).append(address)
                self._store_client.join(address, sid)
            self.recipient_online(identity, namespace)

    def identity_of(self, sid: str) -> str | None:
        """Return namespace and identity of a client, the first that it was given, if any."""
        addresses = self._addresses.get(sid)
        return addresses[0] if addresses else None

    def join_again(self) -> None:
        """Tell the store anew of all devices: it may have forgotten them."""
        with self._lock:
            for address, devices in self._identities.items():
                for sid in devices:
                    self._store_client.join(address, sid)

    def session_opened(self, sid: str, namespace: str) -> None:
        """Look for what waits for a client that is let in now."""
        with self._lock:
            for address in self._addresses.get(sid, ()):
                self.recipient_online(address.partition(",")[2], namespace)
            if sid in self._awaited:
                self._awaited.discard(sid)
                self.recipient_online(sid, namespace)

    def recipient_online(self, recipient: str, namespace: str) -> None:
        """Look for what waits for a recipient who has one more connection here."""
        if not is_text(recipient) or not is_text(namespace):  # no sender can name it
            return
        with self._lock:
            mailbox = self._mailbox(address_of(namespace, recipient), has_more=True)
            self._send_missing(mailbox)
            self._load(mailbox)

    def look_again(self, recipients: Iterable[tuple[str, str]] = ()) -> None:
        """Look up what there is, of which some may have been missed.

        Args:
            recipients: Others who are here, with their namespaces.
        """
        with self._lock:
            for recipient, namespace in recipients:
                if is_text(recipient) and is_text(namespace):
                    self._mailbox(address_of(namespace, recipient), has_more=True)
            for address in self._identities:
                self._mailbox(address, has_more=True)
            for mailbox in list(self._mailboxes.values()):
                mailbox.suspects = set(mailbox.pending_messages)
                self._start_over(mailbox)

    def session_closed(self, sid: str, namespace: str, transport: str | None = None) -> None:
        """Note that a client has left.

        Args:
            sid: Of the client.
            namespace: Socket.IO namespace.
            transport: What its transport is known by, unless that has ended, too.
        """
        address = address_of(namespace, sid)
        with self._lock:
            _remember(self._departed, sid, transport)
            if transport is not None:
                self._owe(transport, sid, clock() + _VISIT_TIME)
            addresses = self._addresses.pop(sid, [])
            for each in addresses:
                devices = self._identities[each]
                devices.discard(sid)
                if not devices:
                    del self._identities[each]
            mailbox = self._mailboxes.get(address)
            is_awaited = mailbox is not None or sid in self._awaited
            if mailbox is not None:
                self._close(mailbox)
            self._awaited.discard(sid)
        for each in addresses:
            self._store_client.leave(each, sid)
        if is_awaited:
            # Nobody else will ever have this session id.
            self._store_client.fail_all(address, DeliveryState.GONE)

    def has_departed(self, sid: str) -> bool:
        """Say whether a client was here and has left, not too long ago."""
        return sid in self._departed

    def _present(self, mailbox: _Mailbox) -> list[str]:
        """Return the session ids of those connections that the messages in a mailbox are for."""
        found = self._connections.find(mailbox.recipient, mailbox.namespace)
        for sid in self._identities.get(mailbox.address, ()):
            if sid not in found and self._connections.is_open(sid):
                found.append(sid)
        return found

    # Who has left, and may be back over the same transport

    def _owe(self, transport: str, what: str, until: float) -> None:
        owed = self._owed.get(transport)
        if owed is None:
            owed = self._owed[transport] = {}
            self._forget_later(transport, until)
        if len(owed) < 2 * self._max_owed:
            owed[what] = until

    def _forget_later(self, transport: str, until: float) -> None:
        delay = max(_REGROUPING_TIME, until - clock())
        self._deadlines.call_later(delay, partial(self._forget_owed, transport))

    def _forget_owed(self, transport: str) -> None:
        with self._lock:
            owed = self._owed_by(transport)
            if owed:
                self._forget_later(transport, max(owed.values()))
            else:
                self._owed.pop(transport, None)

    def _owed_by(self, transport: str) -> dict[str, float]:
        """Return what still counts of what a transport owes."""
        owed = self._owed.get(transport, {})
        now = clock()
        for what in [what for what, until in owed.items() if until <= now]:
            del owed[what]
        return owed

    def _barred_until(self, sid: str, id: str | None = None) -> float:
        """Return until when a client is not sent a message, or anything; 0 if it may be."""
        transport = self._connections.transport_of(sid)
        if transport is None or transport not in self._owed:
            return 0.0
        owed = self._owed_by(transport)
        if len(owed) >= self._max_owed:
            return min(owed.values())
        return owed.get(id, 0.0) if id is not None else 0.0

    def _all_barred_until(self, mailbox: _Mailbox) -> float:
        """Return until when no recipient of a mailbox is sent anything; 0 if one may be."""
        until = [self._barred_until(sid) for sid in self._present(mailbox)]
        return min(until, default=0.0)

    # What there is for them

    def offer(self, delivery: Delivery) -> None:
        """Take a message that was stored just now, if its recipient is here."""
        address = delivery.address
        with self._lock:
            if delivery.recipient not in self._departed:
                mailbox = self._mailbox_of_present(address)
                if mailbox is None:
                    return
                # Ordered ones come from the store, which knows all that go before it.
                is_full = len(mailbox.pending_messages) >= _WINDOW or mailbox.size >= _WINDOW_SIZE
                is_behind = mailbox.has_more or is_full
                if is_behind or delivery.is_ordered:
                    self._load_more(mailbox)
                else:
                    self._take(mailbox, delivery)
                    self._pump(mailbox)
                return
        self._store_client.fail_all(address, DeliveryState.GONE)

    def stored(self, address: str) -> None:
        """Look for messages that were stored just now by others, if their recipient is here."""
        with self._lock:
            if address.partition(",")[2] not in self._departed:
                mailbox = self._mailbox_of_present(address)
                if mailbox is not None:
                    self._load_more(mailbox)
                return
        self._store_client.fail_all(address, DeliveryState.GONE)

    def _mailbox_of_present(self, address: str) -> _Mailbox | None:
        """Return the mailbox of a recipient who is here."""
        mailbox = self._mailboxes.get(address)
        if mailbox is not None:
            return mailbox
        mailbox = _Mailbox(address, has_more=False)
        if self._present(mailbox):
            self._mailboxes[address] = mailbox
            return mailbox
        if self._connections.is_here(mailbox.recipient):  # not let in yet, or leaving
            self._awaited.add(mailbox.recipient)
        return None

    def _load_more(self, mailbox: _Mailbox) -> None:
        mailbox.has_more = mailbox.is_stale = True
        self._load(mailbox)

    def ended(self, delivery: Delivery) -> None:
        """Forget a message that has ended, wherever that was."""
        with self._lock:
            _remember(self._done, delivery.id)
            mailbox = self._mailboxes.get(delivery.address)
            if mailbox is None:
                return
            parked = mailbox.parked.pop(delivery.id, None)
            if parked is not None:
                self._forget(parked)
            pending = mailbox.pending_messages.get(delivery.id)
            if pending is not None:
                self._drop(mailbox, pending)
                self._load(mailbox)
                self._pump(mailbox)

    def _mailbox(self, address: str, *, has_more: bool) -> _Mailbox:
        mailbox = self._mailboxes.get(address)
        if mailbox is None:
            mailbox = self._mailboxes[address] = _Mailbox(address, has_more=has_more)
        return mailbox

    def _load(self, mailbox: _Mailbox) -> None:
        is_room = (
            len(mailbox.pending_messages) <= _WINDOW // 2 and mailbox.size <= _WINDOW_SIZE // 2
        )
        if not mailbox.has_more or mailbox.is_loading or not (is_room or mailbox.suspects):
            return
        until = self._all_barred_until(mailbox) if self._owed else 0.0
        if until:
            if mailbox.restart is None:
                delay = max(_REGROUPING_TIME, until - clock())
                mailbox.restart = self._deadlines.call_later(
                    delay, partial(self._come_back, mailbox)
                )
            return
        mailbox.is_loading, mailbox.is_stale = True, False
        then = partial(self._loaded, mailbox, mailbox.round)
        self._store_client.load(mailbox.address, mailbox.last, _WINDOW, _WINDOW_SIZE, then)

    def _loaded(self, mailbox: _Mailbox, number: int, page: Page) -> None:
        with self._lock:
            mailbox.is_loading = False
            if self._mailboxes.get(mailbox.address) is not mailbox:
                return
            if number == mailbox.round:
                self._read(mailbox, page)
            self._load(mailbox)
            self._pump(mailbox)

    def _read(self, mailbox: _Mailbox, page: Page) -> None:
        if mailbox.suspects:
            self._clear(mailbox, page)
            # Then from the beginning, for those that are not known here.
            mailbox.last = page.last if mailbox.suspects else 0
            return
        mailbox.has_more = page.has_more or mailbox.is_stale
        mailbox.last = page.last or mailbox.last
        for delivery in page.deliveries:
            self._take(mailbox, delivery)
        if mailbox.revisit_after and not page.has_more and mailbox.restart is None:
            mailbox.restart = self._deadlines.call_later(
                mailbox.revisit_after, partial(self._come_back, mailbox)
            )

    def _clear(self, mailbox: _Mailbox, page: Page) -> None:
        """Drop what was here and is not in the store any more."""
        listed = {delivery.id for delivery in page.deliveries}
        for id in list(mailbox.suspects):
            pending = mailbox.pending_messages.get(id)
            if pending is None or id in listed:
                mailbox.suspects.discard(id)
            elif pending.delivery.number <= page.last or not page.has_more:
                mailbox.suspects.discard(id)
                self._drop(mailbox, pending)

    def _start_over(self, mailbox: _Mailbox) -> None:
        """Look through all that the store has for a recipient."""
        if self._mailboxes.get(mailbox.address) is mailbox:
            if mailbox.restart is not None:
                mailbox.restart.cancel()
            mailbox.restart, mailbox.revisit_after = None, 0.0
            mailbox.round += 1
            mailbox.last, mailbox.has_more = 0, True
            self._load(mailbox)

    def _take(self, mailbox: _Mailbox, delivery: Delivery) -> None:
        # What is told of it may come later than it came, or ended.
        if delivery.id in mailbox.pending_messages or delivery.id in self._done:
            return
        pending = mailbox.parked.pop(delivery.id, None)
        if pending is None:
            deadline = clock() + delivery.ttl
            pending = _PendingMessage(delivery, deadline, delivery.attempts, len(delivery.body))
        else:
            pending.delivery = delivery
        mailbox.pending_messages[delivery.id] = pending
        mailbox.size += pending.size
        pending.is_queued = True
        (mailbox.line if delivery.is_ordered else mailbox.ready).append(pending)

    def _drop(self, mailbox: _Mailbox, pending: _PendingMessage) -> None:
        """Know no more of a message."""
        del mailbox.pending_messages[pending.delivery.id]
        mailbox.size -= pending.size
        self._stop_waiting(mailbox, pending)
        self._forget(pending)
        if pending.is_queued or pending.delivery.is_ordered:
            _discard(mailbox.line if pending.delivery.is_ordered else mailbox.ready, pending)

    def _forget(self, pending: _PendingMessage) -> None:
        """Wait for acknowledgements of a message no longer."""
        for sid, ack_id in pending.holders.items():
            self._connections.forget(ack_id, sid)
        pending.holders.clear()

    def _take_away(self, mailbox: _Mailbox) -> None:
        del self._mailboxes[mailbox.address]
        for timer in (mailbox.look, mailbox.restart):
            if timer is not None:
                timer.cancel()
        for pending in mailbox.parked.values():
            self._forget(pending)
        mailbox.parked.clear()

    # Their way

    def _pump(self, mailbox: _Mailbox) -> None:
        """Send what may be sent now."""
        if self._mailboxes.get(mailbox.address) is not mailbox:
            return
        while mailbox.ready and (
            not mailbox.in_flight or self._has_room(mailbox, mailbox.ready[0])
        ):
            if not self._send(mailbox, mailbox.ready.popleft()):
                return
        has_turn = (
            mailbox.line and mailbox.line[0].is_queued and self._has_room(mailbox, mailbox.line[0])
        )
        if has_turn and not self._send(mailbox, mailbox.line[0]):
            return
        is_idle = not mailbox.is_loading and not mailbox.has_more and mailbox.restart is None
        if is_idle and not mailbox.pending_messages:
            self._take_away(mailbox)

    def _has_room(self, mailbox: _Mailbox, pending: _PendingMessage) -> bool:
        if not mailbox.in_flight:
            return True
        size = mailbox.in_flight_size + pending.size
        return mailbox.in_flight < self._max_in_flight and size <= _WINDOW_SIZE

    def _send(
        self, mailbox: _Mailbox, pending: _PendingMessage, *, but: Container[str] = ()
    ) -> bool:
        """Send a message to all that it is for, *but* some; say whether anybody is here."""
        pending.is_queued = False
        now = clock()
        if pending.is_answered or now >= pending.deadline:
            return True  # it is about to end
        present = self._present(mailbox)
        if not present:
            self._close(mailbox)
            return False
        lacking = [sid for sid in present if sid not in pending.acknowledged and sid not in but]
        if not lacking:
            return True  # others have to acknowledge it
        if self._owed:
            barred = {sid: self._barred_until(sid, pending.delivery.id) for sid in lacking}
            lacking = [sid for sid, until in barred.items() if not until]
            if not lacking:
                delay = max(_REGROUPING_TIME, min(barred.values()) - now)
                pending.timer = self._deadlines.call_later(
                    delay, partial(self._due, mailbox, pending)
                )
                return True
        pending.attempts += 1
        self._wait_for(mailbox, pending, now + pending.delivery.retry.ack_timeout)
        for sid in lacking:
            self._hand(mailbox, pending, sid)
        if pending.holders:
            pending.misses = 0
            self._store_client.sent(pending.delivery.id)
        else:  # they are about to leave
            pending.attempts -= 1
            pending.misses += 1
            self._stop_waiting(mailbox, pending)
            delay = min(_REGROUPING_TIME * 2 ** min(pending.misses, 9), _LONGEST_REGROUPING_TIME)
            pending.timer = self._deadlines.call_later(delay, partial(self._due, mailbox, pending))
        return True

    def _wait_for(self, mailbox: _Mailbox, pending: _PendingMessage, until: float) -> None:
        pending.is_waiting, pending.due_at = True, until
        mailbox.in_flight += 1
        mailbox.in_flight_size += pending.size
        self._in_flight += 1
        if until < mailbox.looks_at:
            self._look_at(mailbox, until)

    def _look_at(self, mailbox: _Mailbox, at: float) -> None:
        # One timer for all, which outlives most of what it was set for.
        if mailbox.look is not None:
            mailbox.look.cancel()
        mailbox.looks_at = at
        mailbox.look = self._deadlines.call_later(
            max(0.0, at - clock()), partial(self._overdue, mailbox)
        )

    def _overdue(self, mailbox: _Mailbox) -> None:
        """Take for lost what was not acknowledged in time."""
        with self._lock:
            mailbox.look, mailbox.looks_at = None, math.inf
            now = clock()
            waiting = [
                pending for pending in mailbox.pending_messages.values() if pending.is_waiting
            ]
            later = [pending.due_at for pending in waiting if pending.due_at > now]
            if later:
                self._look_at(mailbox, min(later))
            for pending in waiting:
                if pending.is_waiting and pending.due_at <= now:
                    self._unanswered(mailbox, pending)

    def _hand(self, mailbox: _Mailbox, pending: _PendingMessage, sid: str) -> None:
        delivery = pending.delivery
        arguments = delivery.body
        if delivery.has_id:
            comma = "" if arguments == "[]" else ","
            known_by = f'{{"delivery_id":"{delivery.id}","attempt":{pending.attempts}}}'
            arguments = f"{arguments[:-1]}{comma}{known_by}]"
        callback = _Attempt(self, mailbox, pending, sid)
        # Whichever of several attempts is answered, it is the same answer.
        ack_id = self._connections.ask(
            sid, mailbox.namespace, delivery.event, arguments, callback, pending.holders.get(sid)
        )
        if ack_id is None:
            pending.holders.pop(sid, None)
        else:
            pending.holders[sid] = ack_id

    def answered(
        self, mailbox: _Mailbox, pending: _PendingMessage, sid: str, answer: tuple[Any, ...]
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
                self._stop_waiting(mailbox, pending)  # what is missing is for others to say
        if is_refused:
            self._store_client.give_up(pending.delivery, DeliveryState.REFUSED)
        else:
            self._store_client.acknowledged(pending.delivery, sid)

    def lost(self, mailbox: _Mailbox, pending: _PendingMessage, sid: str, reason: str) -> None:
        """Note that no acknowledgement will come."""
        with self._lock:
            if reason != "gone" or pending.holders.pop(sid, None) is None:
                return
            self._owe_for(pending, sid)
            if not pending.is_waiting or pending.holders:
                return
            self._stop_waiting(mailbox, pending)
            self._store_client.returned(pending.delivery.id)
            if pending.delivery.id in mailbox.pending_messages:
                # Not now: whoever loses its clients one after the other comes by here for each.
                pending.timer = self._deadlines.call_later(
                    _REGROUPING_TIME, partial(self._due, mailbox, pending)
                )

    def _owe_for(self, pending: _PendingMessage, sid: str) -> None:
        """Note that a client has left with a message that it has not acknowledged."""
        if not pending.is_waiting or pending.is_answered or sid in pending.acknowledged:
            return
        transport = self._connections.transport_of(sid) or self._departed.get(sid)
        if transport is not None:
            self._owe(transport, pending.delivery.id, pending.due_at)

    def _unanswered(self, mailbox: _Mailbox, pending: _PendingMessage) -> None:
        self._stop_waiting(mailbox, pending)
        self._store_client.returned(pending.delivery.id)
        retry = pending.delivery.retry
        if (
            mailbox.has_more
            and not pending.delivery.is_ordered
            and len(mailbox.pending_messages) > _WINDOW // 2
        ):
            self._park(mailbox, pending)
        else:
            delay = self._backoff(
                pending.attempts - 1, first_delay=retry.first_delay, max_delay=retry.max_delay
            )
            pending.timer = self._deadlines.call_later(delay, partial(self._due, mailbox, pending))
        self._load(mailbox)
        self._pump(mailbox)

    def _park(self, mailbox: _Mailbox, pending: _PendingMessage) -> None:
        """Let others have the place of a message that is not acknowledged, for a while."""
        del mailbox.pending_messages[pending.delivery.id]
        mailbox.size -= pending.size
        pending.delivery = pending.delivery._replace(body="")  # it comes from the store again
        mailbox.parked[pending.delivery.id] = pending
        mailbox.revisit_after = pending.delivery.retry.max_delay
        if len(mailbox.parked) > _MAX_PARKED:
            self._forget(mailbox.parked.pop(next(iter(mailbox.parked))))

    def _come_back(self, mailbox: _Mailbox) -> None:
        with self._lock:
            self._start_over(mailbox)

    def _due(self, mailbox: _Mailbox, pending: _PendingMessage) -> None:
        with self._lock:
            pending.timer = None
            if (
                self._mailboxes.get(mailbox.address) is mailbox
                and pending.delivery.id in mailbox.pending_messages
            ):
                self._queue(mailbox, pending)
                self._pump(mailbox)

    def _queue(self, mailbox: _Mailbox, pending: _PendingMessage) -> None:
        if not pending.is_queued:
            pending.is_queued = True
            if not pending.delivery.is_ordered:
                mailbox.ready.append(pending)

    def _send_missing(self, mailbox: _Mailbox) -> None:
        """Let a new connection have what others were sent, and what nobody has."""
        present = self._present(mailbox)
        if self._owed:
            present = [sid for sid in present if not self._barred_until(sid)]
        for pending in list(mailbox.pending_messages.values()) if present else ():
            if pending.is_answered or pending.is_queued:
                continue
            lacking = [
                sid
                for sid in present
                if sid not in pending.holders and sid not in pending.acknowledged
            ]
            if pending.is_waiting:
                for sid in lacking:
                    if not self._owed or not self._barred_until(sid, pending.delivery.id):
                        self._hand(mailbox, pending, sid)
            elif lacking:
                self._stop_waiting(mailbox, pending)
                if not self._has_room(mailbox, pending):
                    self._queue(mailbox, pending)
                else:
                    self._send(mailbox, pending, but=set(pending.holders))
        self._pump(mailbox)

    def _stop_waiting(self, mailbox: _Mailbox, pending: _PendingMessage) -> None:
        """Stop waiting for an acknowledgement; one that comes late still counts."""
        if pending.timer is not None:
            pending.timer.cancel()
            pending.timer = None
        if pending.is_waiting:
            pending.is_waiting = False
            mailbox.in_flight -= 1
            mailbox.in_flight_size -= pending.size
            self._in_flight -= 1

    def _close(self, mailbox: _Mailbox) -> None:
        """Return the messages of a recipient that is not here to the store."""
        self._take_away(mailbox)
        if self._connections.is_here(mailbox.recipient):  # not let in yet, or leaving
            self._awaited.add(mailbox.recipient)
        for pending in mailbox.pending_messages.values():
            was_waiting = pending.is_waiting
            for sid in pending.holders:
                self._owe_for(pending, sid)
            self._stop_waiting(mailbox, pending)
            if was_waiting:
                self._store_client.returned(pending.delivery.id)
            self._forget(pending)
        mailbox.pending_messages.clear()
        mailbox.size = 0
        mailbox.ready.clear()
        mailbox.line.clear()


def is_refusal(answer: tuple[Any, ...]) -> bool:
    """Say whether an acknowledgement says that the recipient will not have the message.

    It is an object with a key ``error``, as the guard's own error acknowledgements are.
    """
    return len(answer) == 1 and isinstance(answer[0], dict) and bool(answer[0].get("error"))


def _remember(names: OrderedDict[str, str | None], name: str, transport: str | None = None) -> None:
    names[name] = transport
    if len(names) > _MAX_REMEMBERED:
        names.popitem(last=False)


def _discard(pending_messages: deque[_PendingMessage], pending: _PendingMessage) -> None:
    if pending_messages and pending_messages[0] is pending:
        pending_messages.popleft()
    elif pending in pending_messages:
        pending_messages.remove(pending)
