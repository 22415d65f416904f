"""The mailboxes of connected recipients: each is a window on the messages in the store."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from ..core.runtime import clock
from ..errors import InvalidTransition
from ..states import SENDING_TRANSITIONS, SendingEvent, SendingState
from .presence import remember

if TYPE_CHECKING:
    from _thread import RLock
    from collections.abc import Callable, Iterator

    from ..core.deadlines import Deadline, Deadlines
    from .presence import Presence
    from .records import Delivery
    from .steps import Page

    Load = Callable[[str, int, int, int, Callable[[Page], None]], None]

_WINDOW: Final = 128
"""Messages to one recipient that are loaded; the rest stay in the store until their turn."""

_WINDOW_SIZE: Final = 1024 * 1024
"""Bytes of their bodies; also of those that are in flight to one recipient."""

_MAX_PARKED: Final = 512  # messages to one recipient whose late acknowledgement still counts
_MIN_RESTART_DELAY: Final = 0.02  # seconds

# Each message needs these several times, and a member of an enum is slow to look up.
_QUEUED: Final = SendingState.QUEUED
_AWAITING: Final = SendingState.AWAITING
_DROP: Final = SendingEvent.DROP


@dataclass(slots=True, eq=False)
class PendingMessage:
    """A message on its way to the connections of this process.

    Attributes:
        delivery: The message; without its body while it is parked.
        deadline: When it expires, on the clock of this process.
        attempts: How often it was sent.
        size: Bytes of its body.
        state: Its state in this process; changed by :meth:`Mailboxes.move` alone.
        holders: Acknowledgement ids by the session ids of clients that have it and have not
            acknowledged it. Kept in every state: a late acknowledgement still counts.
        acknowledged: Session ids of clients that have acknowledged it.
        is_refused: Whether a recipient has refused it. Not a state: the answer may come late, in
            any of them.
        timer: Until it is queued again, while it is scheduled.
        due_at: When the attempt counts as lost, while acknowledgements are awaited.
        misses: How often in a row all clients present were about to leave.
    """

    delivery: Delivery
    deadline: float
    attempts: int
    size: int
    state: SendingState = SendingState.QUEUED
    holders: dict[str, int] = field(default_factory=dict)
    acknowledged: frozenset[str] = frozenset()
    is_refused: bool = False
    timer: Deadline | None = None
    due_at: float = 0.0
    misses: int = 0

    @property
    def is_answered(self) -> bool:
        """Whether only the store has yet to record the answer."""
        if self.is_refused:
            return True
        return bool(self.acknowledged) and not self.delivery.requires_all


@dataclass(slots=True, eq=False)
class Mailbox:
    """The messages of one recipient that are loaded here."""

    address: str
    has_more: bool  # messages in the store that are not loaded here
    namespace: str = ""
    recipient: str = ""
    is_open: bool = True  # not removed
    pending_messages: dict[str, PendingMessage] = field(default_factory=dict)
    ready: deque[PendingMessage] = field(default_factory=deque)
    # The ordered messages; the first one has its turn.
    line: deque[PendingMessage] = field(default_factory=deque)
    size: int = 0  # bytes of the bodies of its pending messages
    in_flight: int = 0
    in_flight_size: int = 0  # bytes of their bodies
    looks_at: float = math.inf  # when some of them are overdue
    look: Deadline | None = None
    last: int = 0  # the number of the newest message that was loaded
    round: int = 0  # how often loading began at the first message
    is_loading: bool = False
    is_stale: bool = False  # a message was stored after the current load was asked for
    suspects: set[str] = field(default_factory=set)  # ids that may have ended unnoticed
    # Not acknowledged for long, and out of the way of others for a while.
    parked: dict[str, PendingMessage] = field(default_factory=dict)
    revisit_after: float = 0.0  # seconds until parked messages are loaded again; 0: there are none
    restart: Deadline | None = None

    def __post_init__(self) -> None:
        self.namespace, _, self.recipient = self.address.partition(",")


class Mailboxes:
    """The mailboxes of connected recipients, filled from the store as they empty.

    To be used while *lock* is held. No method waits.

    Args:
        load: Asks the store, see :meth:`~.store_client.StoreClient.load`.
        presence: The recipients.
        deadlines: For timeouts.
        lock: The lock of the dispatcher.
        max_in_flight: Messages to one recipient that may be unacknowledged at a time, >= 1.
        forget: Called with the id of an acknowledgement that is awaited no longer, and the
            session id of the client.
        on_loaded: Called with a mailbox after each load, while *lock* is held.
    """

    def __init__(
        self,
        load: Load,
        presence: Presence,
        deadlines: Deadlines,
        lock: RLock,
        *,
        max_in_flight: int,
        forget: Callable[[int, str], None],
        on_loaded: Callable[[Mailbox], None],
    ) -> None:
        self._load_page = load
        self._presence = presence
        self._deadlines = deadlines
        self._lock = lock
        self._max_in_flight = max_in_flight
        self._forget = forget
        self._on_loaded = on_loaded
        self._mailboxes: dict[str, Mailbox] = {}
        self._done: OrderedDict[str, str | None] = OrderedDict()  # ids of messages that have ended
        self.in_flight = 0
        """How many messages await an acknowledgement."""

    def __iter__(self) -> Iterator[Mailbox]:
        return iter(list(self._mailboxes.values()))

    # The mailboxes

    def get(self, address: str) -> Mailbox | None:
        """Return the mailbox at *address*, if it is open."""
        return self._mailboxes.get(address)

    def open(self, address: str) -> Mailbox:
        """Return the mailbox at *address*; a new one has yet to be loaded."""
        mailbox = self._mailboxes.get(address)
        if mailbox is None:
            mailbox = self._mailboxes[address] = Mailbox(address, has_more=True)
        return mailbox

    def take_away(self, mailbox: Mailbox) -> None:
        """Remove a mailbox with its parked messages."""
        del self._mailboxes[mailbox.address]
        mailbox.is_open = False
        for timer in (mailbox.look, mailbox.restart):
            if timer is not None:
                timer.cancel()
        for pending in mailbox.parked.values():
            self._let_go(mailbox, pending)
        mailbox.parked.clear()

    def close(self, mailbox: Mailbox) -> None:
        """Remove a mailbox with all its messages; they are left to the store."""
        self.take_away(mailbox)
        self._presence.await_recipient(mailbox.recipient)
        for pending in mailbox.pending_messages.values():
            self._let_go(mailbox, pending)
        mailbox.pending_messages.clear()
        mailbox.size = 0
        mailbox.ready.clear()
        mailbox.line.clear()

    def look_again(self) -> None:
        """Compare every mailbox with the store: changes may have been missed."""
        for mailbox in self:
            mailbox.suspects = set(mailbox.pending_messages)
            self._start_over(mailbox)

    # Their messages

    def move(self, mailbox: Mailbox, pending: PendingMessage, event: SendingEvent) -> None:
        """Change the state of a message, and what depends on it: its timer, the counts in flight.

        Raises:
            InvalidTransition: The table has no such transition; nothing is changed.
        """
        old = pending.state
        try:
            new = SENDING_TRANSITIONS[old, event]
        except KeyError:
            raise InvalidTransition(old, event) from None
        pending.state = new
        if old is _AWAITING:
            mailbox.in_flight -= 1
            mailbox.in_flight_size -= pending.size
            self.in_flight -= 1
        elif pending.timer is not None:
            pending.timer.cancel()
            pending.timer = None
        if new is _AWAITING:
            mailbox.in_flight += 1
            mailbox.in_flight_size += pending.size
            self.in_flight += 1

    def has_room(self, mailbox: Mailbox, pending: PendingMessage) -> bool:
        """Return whether one more message may be in flight."""
        if not mailbox.in_flight:
            return True
        size = mailbox.in_flight_size + pending.size
        return mailbox.in_flight < self._max_in_flight and size <= _WINDOW_SIZE

    def queue(self, mailbox: Mailbox, pending: PendingMessage) -> None:
        """Let a message wait for its turn again."""
        self.move(mailbox, pending, SendingEvent.QUEUE)
        if not pending.delivery.is_ordered:  # ordered messages keep their place in line
            mailbox.ready.append(pending)

    def add(self, delivery: Delivery) -> Mailbox | None:
        """Take a message that was stored just now.

        Returns:
            Its mailbox; ``None`` if the recipient is not connected here, or if the message will be
            loaded from the store.
        """
        mailbox = self._mailboxes.get(delivery.address) or self._of_newcomer(delivery.address)
        if mailbox is None:
            return None
        is_full = len(mailbox.pending_messages) >= _WINDOW or mailbox.size >= _WINDOW_SIZE
        # Ordered messages come from the store, which knows all earlier ones.
        if mailbox.has_more or is_full or delivery.is_ordered:
            self._load_more(mailbox)
            return None
        self._take(mailbox, delivery)
        return mailbox

    def look_for_more(self, address: str) -> None:
        """Load what other processes have stored for a recipient, if it is connected here."""
        mailbox = self._mailboxes.get(address) or self._of_newcomer(address)
        if mailbox is not None:
            self._load_more(mailbox)

    def end(self, delivery: Delivery) -> Mailbox | None:
        """Forget a message that has ended; return its mailbox if that has room for others now."""
        remember(self._done, delivery.id)
        mailbox = self._mailboxes.get(delivery.address)
        if mailbox is None:
            return None
        pending = mailbox.pending_messages.get(delivery.id)
        if pending is None:
            parked = mailbox.parked.pop(delivery.id, None)
            if parked is not None:
                self._let_go(mailbox, parked)
            return None
        self._drop(mailbox, pending)
        self.load(mailbox)
        return mailbox

    def has_to_park(self, mailbox: Mailbox, pending: PendingMessage) -> bool:
        """Return whether a message without an answer has to make room for others in the store."""
        is_crowded = len(mailbox.pending_messages) > _WINDOW // 2
        return mailbox.has_more and is_crowded and not pending.delivery.is_ordered

    def park(self, mailbox: Mailbox, pending: PendingMessage) -> None:
        """Take a message that is not acknowledged out of the way of others, for a while."""
        self.move(mailbox, pending, SendingEvent.PARK)
        del mailbox.pending_messages[pending.delivery.id]
        mailbox.size -= pending.size
        pending.delivery = pending.delivery._replace(body="")  # it is loaded again
        mailbox.parked[pending.delivery.id] = pending
        mailbox.revisit_after = pending.delivery.retry.max_delay
        if len(mailbox.parked) > _MAX_PARKED:
            self._let_go(mailbox, mailbox.parked.pop(next(iter(mailbox.parked))))

    def _take(self, mailbox: Mailbox, delivery: Delivery) -> None:
        # A notice may come after the message itself, or after its end.
        if delivery.id in mailbox.pending_messages or delivery.id in self._done:
            return
        pending = mailbox.parked.pop(delivery.id, None)
        if pending is None:
            deadline = clock() + delivery.ttl
            pending = PendingMessage(delivery, deadline, delivery.attempts, len(delivery.body))
        else:
            pending.delivery = delivery
            self.move(mailbox, pending, SendingEvent.QUEUE)
        mailbox.pending_messages[delivery.id] = pending
        mailbox.size += pending.size
        (mailbox.line if delivery.is_ordered else mailbox.ready).append(pending)

    def _drop(self, mailbox: Mailbox, pending: PendingMessage) -> None:
        """Forget a message."""
        del mailbox.pending_messages[pending.delivery.id]
        mailbox.size -= pending.size
        is_ordered = pending.delivery.is_ordered
        if is_ordered or pending.state is _QUEUED:
            _discard(mailbox.line if is_ordered else mailbox.ready, pending)
        self._let_go(mailbox, pending)

    def _let_go(self, mailbox: Mailbox, pending: PendingMessage) -> None:
        self.move(mailbox, pending, _DROP)
        if pending.holders:
            for sid, ack_id in pending.holders.items():
                self._forget(ack_id, sid)
            pending.holders.clear()

    # Loading from the store

    def load(self, mailbox: Mailbox) -> None:
        """Load more messages from the store, if it has any and there is room."""
        is_room = (
            len(mailbox.pending_messages) <= _WINDOW // 2 and mailbox.size <= _WINDOW_SIZE // 2
        )
        if not mailbox.has_more or mailbox.is_loading or not (is_room or mailbox.suspects):
            return
        until = self._presence.all_barred_until(mailbox) if self._presence.owed else 0.0
        if until:
            if mailbox.restart is None:
                self._restart_later(mailbox, max(_MIN_RESTART_DELAY, until - clock()))
            return
        mailbox.is_loading, mailbox.is_stale = True, False
        then = partial(self._loaded, mailbox, mailbox.round)
        self._load_page(mailbox.address, mailbox.last, _WINDOW, _WINDOW_SIZE, then)

    def _of_newcomer(self, address: str) -> Mailbox | None:
        """Return a new mailbox for a recipient that is connected here but has none."""
        mailbox = Mailbox(address, has_more=False)
        if self._presence.find(mailbox):
            self._mailboxes[address] = mailbox
            return mailbox
        self._presence.await_recipient(mailbox.recipient)
        return None

    def _load_more(self, mailbox: Mailbox) -> None:
        mailbox.has_more = mailbox.is_stale = True
        self.load(mailbox)

    def _loaded(self, mailbox: Mailbox, number: int, page: Page) -> None:
        with self._lock:
            mailbox.is_loading = False
            if not mailbox.is_open:
                return
            if number == mailbox.round:
                self._read(mailbox, page)
            self.load(mailbox)
            self._on_loaded(mailbox)

    def _read(self, mailbox: Mailbox, page: Page) -> None:
        if mailbox.suspects:
            self._clear(mailbox, page)
            # Then from the first message on, for those that are not loaded.
            mailbox.last = page.last if mailbox.suspects else 0
            return
        mailbox.has_more = page.has_more or mailbox.is_stale
        mailbox.last = page.last or mailbox.last
        for delivery in page.deliveries:
            self._take(mailbox, delivery)
        if mailbox.revisit_after and not page.has_more and mailbox.restart is None:
            self._restart_later(mailbox, mailbox.revisit_after)

    def _clear(self, mailbox: Mailbox, page: Page) -> None:
        """Drop messages that are no longer in the store."""
        listed = {delivery.id for delivery in page.deliveries}
        for id in list(mailbox.suspects):
            pending = mailbox.pending_messages.get(id)
            if pending is None or id in listed:
                mailbox.suspects.discard(id)
            elif pending.delivery.number <= page.last or not page.has_more:
                mailbox.suspects.discard(id)
                self._drop(mailbox, pending)

    def _restart_later(self, mailbox: Mailbox, delay: float) -> None:
        mailbox.restart = self._deadlines.call_later(delay, partial(self._come_back, mailbox))

    def _come_back(self, mailbox: Mailbox) -> None:
        with self._lock:
            self._start_over(mailbox)

    def _start_over(self, mailbox: Mailbox) -> None:
        """Load the messages of a recipient from the first one on."""
        if mailbox.is_open:
            if mailbox.restart is not None:
                mailbox.restart.cancel()
            mailbox.restart, mailbox.revisit_after = None, 0.0
            mailbox.round += 1
            mailbox.last, mailbox.has_more = 0, True
            self.load(mailbox)


def _discard(pending_messages: deque[PendingMessage], pending: PendingMessage) -> None:
    if pending_messages and pending_messages[0] is pending:
        pending_messages.popleft()
    elif pending in pending_messages:
        pending_messages.remove(pending)
