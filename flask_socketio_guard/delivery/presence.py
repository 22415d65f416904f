"""Which recipients are connected here, which have left, and what their transports owe."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from ..core.runtime import clock

if TYPE_CHECKING:
    from _thread import RLock
    from collections.abc import Iterable, Iterator

    from ..core.deadlines import Deadlines

_MIN_OWED: Final = 16  # least bound of what a transport may owe
_VISIT_TIME: Final = 10.0  # seconds for which a departure counts as owed
_MIN_FORGETTING_TIME: Final = 0.02  # seconds
_MAX_REMEMBERED: Final = 10_000  # names


class Members(Protocol):
    """The clients of this process."""

    def find(self, recipient: str, namespace: str) -> list[str]:
        """Return a new list of the clients with that session id, or in that room."""

    def is_open(self, sid: str) -> bool:
        """Return whether a client has been let in and is not leaving."""

    def is_here(self, sid: str) -> bool:
        """Return whether a client is connected, even if it is not let in yet, or is leaving."""

    def transport_of(self, sid: str) -> str | None:
        """Return the name of a client's transport; ``None`` if that has ended."""


class Addressee(Protocol):
    """The recipient of messages: a session id, a room or an identity in a namespace."""

    @property
    def address(self) -> str:
        """Namespace and recipient, as in :func:`~.records.address_of`."""

    @property
    def namespace(self) -> str:
        """Socket.IO namespace."""

    @property
    def recipient(self) -> str:
        """Session id, room or identity."""


class Presence:
    """The connections of this process, by the names that messages may use for them.

    All methods but :meth:`identity_of` and :meth:`has_departed` are to be called while *lock* is
    held. None waits, and none calls anything but *members* and *deadlines*.

    Args:
        members: The clients.
        deadlines: For the expiry of what a transport owes.
        lock: The lock of the dispatcher.
        max_in_flight: Messages to one recipient that may be unacknowledged at a time, >= 1.

    Attributes:
        departed: Session ids of clients that have left recently, with their transports; read
            only.
        owed: What transports owe, usually nothing: then no client is barred; read only.
    """

    def __init__(
        self, members: Members, deadlines: Deadlines, lock: RLock, *, max_in_flight: int
    ) -> None:
        self._members = members
        self._deadlines = deadlines
        self._lock = lock
        self._identities: dict[str, set[str]] = {}
        self._addresses: dict[str, list[str]] = {}  # by session id, of the identities of a client
        self._awaited: set[str] = set()  # clients that the store may have messages for
        self.departed: OrderedDict[str, str | None] = OrderedDict()
        # By transport: ids of messages that a client on it has left unacknowledged, and session
        # ids that have left, each with its expiry. A client that leaves a namespace and joins it
        # again is not sent everything anew.
        self.owed: dict[str, dict[str, float]] = {}
        self._max_owed = max(_MIN_OWED, max_in_flight)

    # Connected recipients

    def identify(self, sid: str, address: str) -> bool:
        """Note that a client is a device of the identity at *address*; return whether it is new."""
        devices = self._identities.setdefault(address, set())
        if sid in devices:
            return False
        devices.add(sid)
        self._addresses.setdefault(sid, []).append(address)
        return True

    def identity_of(self, sid: str) -> str | None:
        """Return the address of the first identity that a client was given, if any."""
        addresses = self._addresses.get(sid)
        return addresses[0] if addresses else None

    def addresses_of(self, sid: str) -> Iterable[str]:
        """Return the addresses of all identities of a client."""
        return self._addresses.get(sid, ())

    def identities(self) -> Iterable[str]:
        """Return the addresses of all identities that have a device here."""
        return self._identities

    def devices(self) -> Iterator[tuple[str, str]]:
        """Yield the address of each identity with the session id of each of its devices."""
        for address, devices in self._identities.items():
            for sid in devices:
                yield address, sid

    def find(self, addressee: Addressee) -> list[str]:
        """Return the session ids of the connections that messages to *addressee* are for."""
        found = self._members.find(addressee.recipient, addressee.namespace)
        for sid in self._identities.get(addressee.address, ()):
            if sid not in found and self._members.is_open(sid):
                found.append(sid)
        return found

    # Clients that are about to be let in, and clients that have left

    def await_recipient(self, recipient: str) -> None:
        """Note that there may be messages for a client that is not let in yet, or is leaving."""
        if self._members.is_here(recipient):
            self._awaited.add(recipient)

    def stop_awaiting(self, sid: str) -> bool:
        """Return whether there may be messages for a client, and forget that."""
        if sid not in self._awaited:
            return False
        self._awaited.discard(sid)
        return True

    def leave(self, sid: str, transport: str | None) -> list[str]:
        """Note that a client has left.

        Args:
            sid: Of the client.
            transport: The name of its transport, unless that has ended, too.

        Returns:
            The addresses of its identities.
        """
        remember(self.departed, sid, transport)
        if transport is not None:
            self._note_debt(transport, sid, clock() + _VISIT_TIME)
        addresses = self._addresses.pop(sid, [])
        for address in addresses:
            devices = self._identities[address]
            devices.discard(sid)
            if not devices:
                del self._identities[address]
        return addresses

    def has_departed(self, sid: str) -> bool:
        """Return whether a client has left recently."""
        return sid in self.departed

    # Clients that have left, and may be back over the same transport

    def owe(self, sid: str, id: str, until: float) -> None:
        """Note that a client has left with a message that it has not acknowledged.

        Args:
            sid: Session id of the client.
            id: Of the message.
            until: When this expires, on the clock of this process.
        """
        transport = self._members.transport_of(sid) or self.departed.get(sid)
        if transport is not None:
            self._note_debt(transport, id, until)

    def barred_until(self, sid: str, id: str | None = None) -> float:
        """Return until when a client must not be sent message *id*, or anything; 0 if it may."""
        transport = self._members.transport_of(sid)
        if transport is None or transport not in self.owed:
            return 0.0
        owed = self._owed_by(transport)
        if len(owed) >= self._max_owed:
            return min(owed.values())
        return owed.get(id, 0.0) if id is not None else 0.0

    def all_barred_until(self, addressee: Addressee) -> float:
        """Return until when all connections of *addressee* are barred; 0 if one is not."""
        until = [self.barred_until(sid) for sid in self.find(addressee)]
        return min(until, default=0.0)

    def _note_debt(self, transport: str, what: str, until: float) -> None:
        owed = self.owed.get(transport)
        if owed is None:
            owed = self.owed[transport] = {}
            self._forget_later(transport, until)
        if len(owed) < 2 * self._max_owed:
            owed[what] = until

    def _forget_later(self, transport: str, until: float) -> None:
        delay = max(_MIN_FORGETTING_TIME, until - clock())
        self._deadlines.call_later(delay, partial(self._forget_owed, transport))

    def _forget_owed(self, transport: str) -> None:
        with self._lock:
            owed = self._owed_by(transport)
            if owed:
                self._forget_later(transport, max(owed.values()))
            else:
                self.owed.pop(transport, None)

    def _owed_by(self, transport: str) -> dict[str, float]:
        """Return what a transport owes, without what has expired."""
        owed = self.owed.get(transport, {})
        now = clock()
        for what in [what for what, until in owed.items() if until <= now]:
            del owed[what]
        return owed


def remember(names: OrderedDict[str, str | None], name: str, value: str | None = None) -> None:
    """Add a name to a bounded set of names, from which the oldest is dropped."""
    names[name] = value
    if len(names) > _MAX_REMEMBERED:
        names.popitem(last=False)
