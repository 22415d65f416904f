"""What this process knows of the messages of each recipient: a window on what the store has."""

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
"""Messages to one recipient that are known here; the rest stay in the store until their turn."""

_WINDOW_SIZE: Final = 1024 * 1024
"""Bytes of their bodies, and of those that one recipient has and has not acknowledged."""

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
        state: Where it is on its way; changed by :meth:`Mailboxes.move` alone.
        holders: Who has it and has not acknowledged it, and what that acknowledgement is known
            by. They keep it, whatever the state: one that comes late still counts.
        acknowledged: Who has acknowledged it.
        is_refused: Whether a recipient will not have it. No state: the answer may come late, in
            any of them.
        timer: Until it is queued again, while it is scheduled.
        due_at: When it counts as unanswered, while acknowledgements are awaited.
        misses: How often in a row all those present were about to leave.
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
        """Whether there is nothing left but to tell the store."""
        if self.is_refused:
            return True
        return bool(self.acknowledged) and not self.delivery.requires_all


@dataclass(slots=True, eq=False)
class Mailbox:
    """What is known here of one recipient's messages."""

    address: str
    has_more: bool  # in the store than is known here
    namespace: str = ""
    recipient: str = ""
    is_open: bool = True  # it is the one at its address, and not taken away
    pending_messages: dict[str, PendingMessage] = field(default_factory=dict)
    ready: deque[PendingMessage] = field(default_factory=deque)
    line: deque[PendingMessage] = field(
        default_factory=deque
    )  # the ordered ones; the first has its turn
    size: int = 0  # of the bodies of its pending_messages
    in_flight: int = 0
    in_flight_size: int = 0  # of their bodies
    looks_at: float = math.inf  # when some of them are overdue
    look: Deadline | None = None
    last: int = 0  # the number of the newest message that came from the store
    round: int = 0  # how often the store was looked through from the beginning
    is_loading: bool = False
    is_stale: bool = False  # something was stored since what is being loaded was asked for
    suspects: set[str] = field(default_factory=set)  # may have ended without our hearing of it
    parked: dict[str, PendingMessage] = field(
        default_factory=dict
    )  # out of the way of others, for a while
    revisit_after: float = 0.0  # seconds until parked messages are looked for; 0: there are none
    restart: Deadline | None = None

    def __post_init__(self) -> None:
        self.namespace, _, self.recipient = self.address.partition(",")


class Mailboxes:
    """The mailboxes of the recipients who are here, filled from the store as they empty.

    To be used while *lock* is held. No method waits.

    Args:
        load: Asks the store, see :meth:`~.store_client.StoreClient.load`.
        presence: The recipients.
        deadlines: For timeouts.
        lock: That of the dispatcher.
        max_in_flight: Messages to one recipient that may be unacknowledged at a time, >= 1.
        forget: Called with what an awaited acknowledgement is known by and the session id of
            the client, if it is awaited no longer.
        on_loaded: Called with a mailbox that the store has answered for, while *lock* is held.
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
        self._done: OrderedDict[str, str | None] = OrderedDict()  # ids of messages that are no more
        self.in_flight = 0
        """How many messages wait for an acknowledgement."""

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
        """Remove a mailbox, with what is parked there."""
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
        """Look through all that the store has for those who have a mailbox."""
        for mailbox in self:
            mailbox.suspects = set(mailbox.pending_messages)
            self._start_over(mailbox)

    # Their messages

    def move(self, mailbox: Mailbox, pending: PendingMessage, event: SendingEvent) -> None:
        """Change the state of a message, and what depends on it: its timer, what is in flight.

        Raises:
            InvalidTransition: The table has no such move; nothing is changed.
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
        """Let a message wait for its turn once more."""
        self.move(mailbox, pending, SendingEvent.QUEUE)
        if not pending.delivery.is_ordered:  # those keep their place in line
            mailbox.ready.append(pending)

    def add(self, delivery: Delivery) -> Mailbox | None:
        """Take a message that was stored just now.

        Returns:
            Its mailbox; ``None`` if the recipient is not here, or the message comes from the
            store later.
        """
        mailbox = self._mailboxes.get(delivery.address) or self._of_newcomer(delivery.address)
        if mailbox is None:
            return None
        is_full = len(mailbox.pending_messages) >= _WINDOW or mailbox.size >= _WINDOW_SIZE
        # Ordered ones come from the store, which knows all that go before it.
        if mailbox.has_more or is_full or delivery.is_ordered:
            self._load_more(mailbox)
            return None
        self._take(mailbox, delivery)
        return mailbox

    def look_for_more(self, address: str) -> None:
        """Load what others have stored for a recipient who is here."""
        mailbox = self._mailboxes.get(address) or self._of_newcomer(address)
        if mailbox is not None:
            self._load_more(mailbox)

    def end(self, delivery: Delivery) -> Mailbox | None:
        """Forget a message that has ended; return the mailbox that has room for others now."""
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
        """Return whether others in the store want the place of a message that was not answered."""
        is_crowded = len(mailbox.pending_messages) > _WINDOW // 2
        return mailbox.has_more and is_crowded and not pending.delivery.is_ordered

    def park(self, mailbox: Mailbox, pending: PendingMessage) -> None:
        """Let others have the place of a message that is not acknowledged, for a while."""
        self.move(mailbox, pending, SendingEvent.PARK)
        del mailbox.pending_messages[pending.delivery.id]
        mailbox.size -= pending.size
        pending.delivery = pending.delivery._replace(body="")  # it comes from the store again
        mailbox.parked[pending.delivery.id] = pending
        mailbox.revisit_after = pending.delivery.retry.max_delay
        if len(mailbox.parked) > _MAX_PARKED:
            self._let_go(mailbox, mailbox.parked.pop(next(iter(mailbox.parked))))

    def _take(self, mailbox: Mailbox, delivery: Delivery) -> None:
        # What is told of it may come later than it came, or ended.
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
        """Know no more of a message."""
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

    # What the store has

    def load(self, mailbox: Mailbox) -> None:
        """Ask the store for more, if it has any and there is room."""
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
        """Return a new mailbox for a recipient who is here."""
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
            # Then from the beginning, for those that are not known here.
            mailbox.last = page.last if mailbox.suspects else 0
            return
        mailbox.has_more = page.has_more or mailbox.is_stale
        mailbox.last = page.last or mailbox.last
        for delivery in page.deliveries:
            self._take(mailbox, delivery)
        if mailbox.revisit_after and not page.has_more and mailbox.restart is None:
            self._restart_later(mailbox, mailbox.revisit_after)

    def _clear(self, mailbox: Mailbox, page: Page) -> None:
        """Drop what was here and is not in the store any more."""
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
        """Look through all that the store has for a recipient."""
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
