"""Brings messages to the connections of this process until they are acknowledged.

The store knows what there is; the courier knows who is here, what is on its way, and when
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
from ..core.runtime import clock
from ..states import DeliveryState
from .records import address_of, is_text

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
_MAX_ASIDE: Final = 512  # messages to one recipient whose late acknowledgement still counts
_MAX_REMEMBERED: Final = 10_000  # connections and messages that are no more
_REGROUPING_TIME: Final = 0.02  # seconds until those that are left get what others left behind
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
    parcels: dict[str, _PendingMessage] = field(default_factory=dict)
    ready: deque[_PendingMessage] = field(default_factory=deque)
    line: deque[_PendingMessage] = field(
        default_factory=deque
    )  # the ordered ones; the first has its turn
    size: int = 0  # of the bodies of its parcels
    in_flight: int = 0
    in_flight_size: int = 0  # of their bodies
    looks_at: float = math.inf  # when some of them are overdue
    look: Timer | None = None
    last: int = 0  # the number of the newest message that came from the store
    round: int = 0  # how often the store was looked through from the beginning
    is_loading: bool = False
    is_stale: bool = False  # something was stored since what is being loaded was asked for
    suspects: set[str] = field(default_factory=set)  # may have ended without our hearing of it
    aside: dict[str, _PendingMessage] = field(
        default_factory=dict
    )  # out of the way of others, for a while
    rest: float = 0.0  # seconds until those that were set aside are looked for; 0: there are none
    restart: Timer | None = None

    def __post_init__(self) -> None:
        self.namespace, _, self.recipient = self.address.partition(",")


class _Attempt:
    """A message in the hands of one client, whose acknowledgement is awaited."""

    __slots__ = ("_box", "_courier", "_parcel", "_sid")

    timeout = 1e9  # seconds; a message that ends is forgotten, and so is whom it was for
    is_inline = True

    def __init__(
        self, courier: Dispatcher, box: _Mailbox, parcel: _PendingMessage, sid: str
    ) -> None:
        self._courier = courier
        self._box = box
        self._parcel = parcel
        self._sid = sid

    def function(self, *answer: Any) -> None:
        self._courier.answered(self._box, self._parcel, self._sid, answer)

    def on_lost(self, reason: str) -> None:
        self._courier.lost(self._box, self._parcel, self._sid, reason)


class Dispatcher:
    """The messages on their way to clients of this process.

    To be used at home only; there, from any task or thread.

    Args:
        desk: The way to the store. It is never told of an end while the lock is held, because
            it may tell others of it.
        connections: The clients.
        deadlines: For timeouts.
        max_in_flight: Messages to one recipient that may be unacknowledged at a time, >= 1.
        backoff: Returns a delay, as :func:`~flask_socketio_guard.backoff.backoff_delay`.
    """

    def __init__(
        self,
        desk: StoreClient,
        connections: Connections,
        deadlines: Deadlines,
        *,
        max_in_flight: int,
        backoff: Callable[..., float] = backoff_delay,
    ) -> None:
        self._lock = RLock()  # nobody waits while holding it
        self._store_client = desk
        self._connections = connections
        self._deadlines = deadlines
        self._max_in_flight = max_in_flight
        self._backoff = backoff
        self._in_flight = 0
        self._boxes: dict[str, _Mailbox] = {}
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
            self.came(identity, namespace)

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

    def opened(self, sid: str, namespace: str) -> None:
        """Look for what waits for a client that is let in now."""
        with self._lock:
            for address in self._addresses.get(sid, ()):
                self.came(address.partition(",")[2], namespace)
            if sid in self._awaited:
                self._awaited.discard(sid)
                self.came(sid, namespace)

    def came(self, recipient: str, namespace: str) -> None:
        """Look for what waits for a recipient who has one more connection here."""
        if not is_text(recipient) or not is_text(namespace):  # no sender can name it
            return
        with self._lock:
            box = self._box(address_of(namespace, recipient), has_more=True)
            self._welcome(box)
            self._load(box)

    def look_again(self, recipients: Iterable[tuple[str, str]] = ()) -> None:
        """Look up what there is, of which some may have been missed.

        Args:
            recipients: Others who are here, with their namespaces.
        """
        with self._lock:
            for recipient, namespace in recipients:
                if is_text(recipient) and is_text(namespace):
                    self._box(address_of(namespace, recipient), has_more=True)
            for address in self._identities:
                self._box(address, has_more=True)
            for box in list(self._boxes.values()):
                box.suspects = set(box.parcels)
                self._start_over(box)

    def left(self, sid: str, namespace: str, transport: str | None = None) -> None:
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
            box = self._boxes.get(address)
            is_awaited = box is not None or sid in self._awaited
            if box is not None:
                self._close(box)
            self._awaited.discard(sid)
        for each in addresses:
            self._store_client.leave(each, sid)
        if is_awaited:
            # Nobody else will ever have this session id.
            self._store_client.abandon(address, DeliveryState.GONE)

    def has_departed(self, sid: str) -> bool:
        """Say whether a client was here and has left, not too long ago."""
        return sid in self._departed

    def _present(self, box: _Mailbox) -> list[str]:
        """Return the session ids of those connections that the messages in a box are for."""
        found = self._connections.find(box.recipient, box.namespace)
        for sid in self._identities.get(box.address, ()):
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

    def _all_barred_until(self, box: _Mailbox) -> float:
        """Return until when nobody who is here for a box is sent anything; 0 if somebody may be."""
        until = [self._barred_until(sid) for sid in self._present(box)]
        return min(until, default=0.0)

    # What there is for them

    def offer(self, delivery: Delivery) -> None:
        """Take a message that was stored just now, if its recipient is here."""
        address = delivery.address
        with self._lock:
            if delivery.recipient not in self._departed:
                box = self._box_of_present(address)
                if box is None:
                    return
                # Ordered ones come from the store, which knows all that go before it.
                is_full = len(box.parcels) >= _WINDOW or box.size >= _WINDOW_SIZE
                is_behind = box.has_more or is_full
                if is_behind or delivery.is_ordered:
                    self._load_more(box)
                else:
                    self._take(box, delivery)
                    self._pump(box)
                return
        self._store_client.abandon(address, DeliveryState.GONE)

    def stored(self, address: str) -> None:
        """Look for messages that were stored just now by others, if their recipient is here."""
        with self._lock:
            if address.partition(",")[2] not in self._departed:
                box = self._box_of_present(address)
                if box is not None:
                    self._load_more(box)
                return
        self._store_client.abandon(address, DeliveryState.GONE)

    def _box_of_present(self, address: str) -> _Mailbox | None:
        """Return the box of a recipient who is here."""
        box = self._boxes.get(address)
        if box is not None:
            return box
        box = _Mailbox(address, has_more=False)
        if self._present(box):
            self._boxes[address] = box
            return box
        if self._connections.is_here(box.recipient):  # not let in yet, or leaving
            self._awaited.add(box.recipient)
        return None

    def _load_more(self, box: _Mailbox) -> None:
        box.has_more = box.is_stale = True
        self._load(box)

    def ended(self, delivery: Delivery) -> None:
        """Forget a message that has ended, wherever that was."""
        with self._lock:
            _remember(self._done, delivery.id)
            box = self._boxes.get(delivery.address)
            if box is None:
                return
            aside = box.aside.pop(delivery.id, None)
            if aside is not None:
                self._forget(aside)
            parcel = box.parcels.get(delivery.id)
            if parcel is not None:
                self._drop(box, parcel)
                self._load(box)
                self._pump(box)

    def _box(self, address: str, *, has_more: bool) -> _Mailbox:
        box = self._boxes.get(address)
        if box is None:
            box = self._boxes[address] = _Mailbox(address, has_more=has_more)
        return box

    def _load(self, box: _Mailbox) -> None:
        is_room = len(box.parcels) <= _WINDOW // 2 and box.size <= _WINDOW_SIZE // 2
        if not box.has_more or box.is_loading or not (is_room or box.suspects):
            return
        until = self._all_barred_until(box) if self._owed else 0.0
        if until:
            if box.restart is None:
                delay = max(_REGROUPING_TIME, until - clock())
                box.restart = self._deadlines.call_later(delay, partial(self._come_back, box))
            return
        box.is_loading, box.is_stale = True, False
        then = partial(self._loaded, box, box.round)
        self._store_client.load(box.address, box.last, _WINDOW, _WINDOW_SIZE, then)

    def _loaded(self, box: _Mailbox, number: int, page: Page) -> None:
        with self._lock:
            box.is_loading = False
            if self._boxes.get(box.address) is not box:
                return
            if number == box.round:
                self._read(box, page)
            self._load(box)
            self._pump(box)

    def _read(self, box: _Mailbox, page: Page) -> None:
        if box.suspects:
            self._clear(box, page)
            # Then from the beginning, for those that are not known here.
            box.last = page.last if box.suspects else 0
            return
        box.has_more = page.has_more or box.is_stale
        box.last = page.last or box.last
        for delivery in page.deliveries:
            self._take(box, delivery)
        if box.rest and not page.has_more and box.restart is None:
            box.restart = self._deadlines.call_later(box.rest, partial(self._come_back, box))

    def _clear(self, box: _Mailbox, page: Page) -> None:
        """Drop what was here and is not in the store any more."""
        listed = {delivery.id for delivery in page.deliveries}
        for id in list(box.suspects):
            parcel = box.parcels.get(id)
            if parcel is None or id in listed:
                box.suspects.discard(id)
            elif parcel.delivery.number <= page.last or not page.has_more:
                box.suspects.discard(id)
                self._drop(box, parcel)

    def _start_over(self, box: _Mailbox) -> None:
        """Look through all that the store has for a recipient."""
        if self._boxes.get(box.address) is box:
            if box.restart is not None:
                box.restart.cancel()
            box.restart, box.rest = None, 0.0
            box.round += 1
            box.last, box.has_more = 0, True
            self._load(box)

    def _take(self, box: _Mailbox, delivery: Delivery) -> None:
        # What is told of it may come later than it came, or ended.
        if delivery.id in box.parcels or delivery.id in self._done:
            return
        parcel = box.aside.pop(delivery.id, None)
        if parcel is None:
            deadline = clock() + delivery.lifetime
            parcel = _PendingMessage(delivery, deadline, delivery.attempts, len(delivery.body))
        else:
            parcel.delivery = delivery
        box.parcels[delivery.id] = parcel
        box.size += parcel.size
        parcel.is_queued = True
        (box.line if delivery.is_ordered else box.ready).append(parcel)

    def _drop(self, box: _Mailbox, parcel: _PendingMessage) -> None:
        """Know no more of a message."""
        del box.parcels[parcel.delivery.id]
        box.size -= parcel.size
        self._put_down(box, parcel)
        self._forget(parcel)
        if parcel.is_queued or parcel.delivery.is_ordered:
            _discard(box.line if parcel.delivery.is_ordered else box.ready, parcel)

    def _forget(self, parcel: _PendingMessage) -> None:
        """Wait for acknowledgements of a message no longer."""
        for sid, ack_id in parcel.holders.items():
            self._connections.forget(ack_id, sid)
        parcel.holders.clear()

    def _take_away(self, box: _Mailbox) -> None:
        del self._boxes[box.address]
        for timer in (box.look, box.restart):
            if timer is not None:
                timer.cancel()
        for parcel in box.aside.values():
            self._forget(parcel)
        box.aside.clear()

    # Their way

    def _pump(self, box: _Mailbox) -> None:
        """Send what may be sent now."""
        if self._boxes.get(box.address) is not box:
            return
        while box.ready and (not box.in_flight or self._has_room(box, box.ready[0])):
            if not self._send(box, box.ready.popleft()):
                return
        has_turn = box.line and box.line[0].is_queued and self._has_room(box, box.line[0])
        if has_turn and not self._send(box, box.line[0]):
            return
        is_idle = not box.is_loading and not box.has_more and box.restart is None
        if is_idle and not box.parcels:
            self._take_away(box)

    def _has_room(self, box: _Mailbox, parcel: _PendingMessage) -> bool:
        if not box.in_flight:
            return True
        size = box.in_flight_size + parcel.size
        return box.in_flight < self._max_in_flight and size <= _WINDOW_SIZE

    def _send(self, box: _Mailbox, parcel: _PendingMessage, *, but: Container[str] = ()) -> bool:
        """Send a message to all that it is for, *but* some; say whether anybody is here."""
        parcel.is_queued = False
        now = clock()
        if parcel.is_answered or now >= parcel.deadline:
            return True  # it is about to end
        present = self._present(box)
        if not present:
            self._close(box)
            return False
        lacking = [sid for sid in present if sid not in parcel.acknowledged and sid not in but]
        if not lacking:
            return True  # others have to acknowledge it
        if self._owed:
            barred = {sid: self._barred_until(sid, parcel.delivery.id) for sid in lacking}
            lacking = [sid for sid, until in barred.items() if not until]
            if not lacking:
                delay = max(_REGROUPING_TIME, min(barred.values()) - now)
                parcel.timer = self._deadlines.call_later(delay, partial(self._due, box, parcel))
                return True
        parcel.attempts += 1
        self._wait_for(box, parcel, now + parcel.delivery.retry.ack_timeout)
        for sid in lacking:
            self._hand(box, parcel, sid)
        if parcel.holders:
            parcel.misses = 0
            self._store_client.sent(parcel.delivery.id)
        else:  # they are about to leave
            parcel.attempts -= 1
            parcel.misses += 1
            self._put_down(box, parcel)
            delay = min(_REGROUPING_TIME * 2 ** min(parcel.misses, 9), _LONGEST_REGROUPING_TIME)
            parcel.timer = self._deadlines.call_later(delay, partial(self._due, box, parcel))
        return True

    def _wait_for(self, box: _Mailbox, parcel: _PendingMessage, until: float) -> None:
        parcel.is_waiting, parcel.due_at = True, until
        box.in_flight += 1
        box.in_flight_size += parcel.size
        self._in_flight += 1
        if until < box.looks_at:
            self._look_at(box, until)

    def _look_at(self, box: _Mailbox, at: float) -> None:
        # One timer for all, which outlives most of what it was set for.
        if box.look is not None:
            box.look.cancel()
        box.looks_at = at
        box.look = self._deadlines.call_later(max(0.0, at - clock()), partial(self._overdue, box))

    def _overdue(self, box: _Mailbox) -> None:
        """Take for lost what was not acknowledged in time."""
        with self._lock:
            box.look, box.looks_at = None, math.inf
            now = clock()
            waiting = [parcel for parcel in box.parcels.values() if parcel.is_waiting]
            later = [parcel.due_at for parcel in waiting if parcel.due_at > now]
            if later:
                self._look_at(box, min(later))
            for parcel in waiting:
                if parcel.is_waiting and parcel.due_at <= now:
                    self._unanswered(box, parcel)

    def _hand(self, box: _Mailbox, parcel: _PendingMessage, sid: str) -> None:
        delivery = parcel.delivery
        arguments = delivery.body
        if delivery.has_id:
            comma = "" if arguments == "[]" else ","
            known_by = f'{{"delivery_id":"{delivery.id}","attempt":{parcel.attempts}}}'
            arguments = f"{arguments[:-1]}{comma}{known_by}]"
        callback = _Attempt(self, box, parcel, sid)
        # Whichever of several attempts is answered, it is the same answer.
        ack_id = self._connections.ask(
            sid, box.namespace, delivery.event, arguments, callback, parcel.holders.get(sid)
        )
        if ack_id is None:
            parcel.holders.pop(sid, None)
        else:
            parcel.holders[sid] = ack_id

    def answered(
        self, box: _Mailbox, parcel: _PendingMessage, sid: str, answer: tuple[Any, ...]
    ) -> None:
        """Act on an acknowledgement."""
        is_refused = is_refusal(answer)
        with self._lock:
            parcel.holders.pop(sid, None)
            if is_refused:
                parcel.is_refused = True
            else:
                parcel.acknowledged |= {sid}
            if not parcel.holders or parcel.is_answered:
                self._put_down(box, parcel)  # what is missing is for others to say
        if is_refused:
            self._store_client.give_up(parcel.delivery, DeliveryState.REFUSED)
        else:
            self._store_client.acknowledged(parcel.delivery, sid)

    def lost(self, box: _Mailbox, parcel: _PendingMessage, sid: str, reason: str) -> None:
        """Note that no acknowledgement will come."""
        with self._lock:
            if reason != "gone" or parcel.holders.pop(sid, None) is None:
                return
            self._owe_for(parcel, sid)
            if not parcel.is_waiting or parcel.holders:
                return
            self._put_down(box, parcel)
            self._store_client.returned(parcel.delivery.id)
            if parcel.delivery.id in box.parcels:
                # Not now: whoever loses its clients one after the other comes by here for each.
                parcel.timer = self._deadlines.call_later(
                    _REGROUPING_TIME, partial(self._due, box, parcel)
                )

    def _owe_for(self, parcel: _PendingMessage, sid: str) -> None:
        """Note that a client has left with a message that it has not acknowledged."""
        if not parcel.is_waiting or parcel.is_answered or sid in parcel.acknowledged:
            return
        transport = self._connections.transport_of(sid) or self._departed.get(sid)
        if transport is not None:
            self._owe(transport, parcel.delivery.id, parcel.due_at)

    def _unanswered(self, box: _Mailbox, parcel: _PendingMessage) -> None:
        self._put_down(box, parcel)
        self._store_client.returned(parcel.delivery.id)
        retry = parcel.delivery.retry
        if box.has_more and not parcel.delivery.is_ordered and len(box.parcels) > _WINDOW // 2:
            self._set_aside(box, parcel)
        else:
            delay = self._backoff(
                parcel.attempts - 1, first_delay=retry.first_delay, max_delay=retry.max_delay
            )
            parcel.timer = self._deadlines.call_later(delay, partial(self._due, box, parcel))
        self._load(box)
        self._pump(box)

    def _set_aside(self, box: _Mailbox, parcel: _PendingMessage) -> None:
        """Let others have the place of a message that is not acknowledged, for a while."""
        del box.parcels[parcel.delivery.id]
        box.size -= parcel.size
        parcel.delivery = parcel.delivery._replace(body="")  # it comes from the store again
        box.aside[parcel.delivery.id] = parcel
        box.rest = parcel.delivery.retry.max_delay
        if len(box.aside) > _MAX_ASIDE:
            self._forget(box.aside.pop(next(iter(box.aside))))

    def _come_back(self, box: _Mailbox) -> None:
        with self._lock:
            self._start_over(box)

    def _due(self, box: _Mailbox, parcel: _PendingMessage) -> None:
        with self._lock:
            parcel.timer = None
            if self._boxes.get(box.address) is box and parcel.delivery.id in box.parcels:
                self._queue(box, parcel)
                self._pump(box)

    def _queue(self, box: _Mailbox, parcel: _PendingMessage) -> None:
        if not parcel.is_queued:
            parcel.is_queued = True
            if not parcel.delivery.is_ordered:
                box.ready.append(parcel)

    def _welcome(self, box: _Mailbox) -> None:
        """Let a new connection have what others were sent, and what nobody has."""
        present = self._present(box)
        if self._owed:
            present = [sid for sid in present if not self._barred_until(sid)]
        for parcel in list(box.parcels.values()) if present else ():
            if parcel.is_answered or parcel.is_queued:
                continue
            lacking = [
                sid
                for sid in present
                if sid not in parcel.holders and sid not in parcel.acknowledged
            ]
            if parcel.is_waiting:
                for sid in lacking:
                    if not self._owed or not self._barred_until(sid, parcel.delivery.id):
                        self._hand(box, parcel, sid)
            elif lacking:
                self._put_down(box, parcel)
                if not self._has_room(box, parcel):
                    self._queue(box, parcel)
                else:
                    self._send(box, parcel, but=set(parcel.holders))
        self._pump(box)

    def _put_down(self, box: _Mailbox, parcel: _PendingMessage) -> None:
        """Stop waiting for an acknowledgement; one that comes late still counts."""
        if parcel.timer is not None:
            parcel.timer.cancel()
            parcel.timer = None
        if parcel.is_waiting:
            parcel.is_waiting = False
            box.in_flight -= 1
            box.in_flight_size -= parcel.size
            self._in_flight -= 1

    def _close(self, box: _Mailbox) -> None:
        """Return the messages of a recipient that is not here to the store."""
        self._take_away(box)
        if self._connections.is_here(box.recipient):  # not let in yet, or leaving
            self._awaited.add(box.recipient)
        for parcel in box.parcels.values():
            was_waiting = parcel.is_waiting
            for sid in parcel.holders:
                self._owe_for(parcel, sid)
            self._put_down(box, parcel)
            if was_waiting:
                self._store_client.returned(parcel.delivery.id)
            self._forget(parcel)
        box.parcels.clear()
        box.size = 0
        box.ready.clear()
        box.line.clear()


def is_refusal(answer: tuple[Any, ...]) -> bool:
    """Say whether an acknowledgement says that the recipient will not have the message.

    It is an object with a key ``error``, as the guard's own error acknowledgements are.
    """
    return len(answer) == 1 and isinstance(answer[0], dict) and bool(answer[0].get("error"))


def _remember(names: OrderedDict[str, str | None], name: str, transport: str | None = None) -> None:
    names[name] = transport
    if len(names) > _MAX_REMEMBERED:
        names.popitem(last=False)


def _discard(parcels: deque[_PendingMessage], parcel: _PendingMessage) -> None:
    if parcels and parcels[0] is parcel:
        parcels.popleft()
    elif parcel in parcels:
        parcels.remove(parcel)
