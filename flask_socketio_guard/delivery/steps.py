"""What a store of acknowledged delivery can be asked to do, one class for each step.

A store acts on the class of a step and its fields. The step itself knows the words by which the
script of the Redis store is asked for it, and how to read the answer.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

from ..states import DeliveryState
from .records import DEAD
from .redis_format import (
    read_all_ended,
    read_ended,
    read_letter,
    read_message,
    readable,
    size_in_redis,
)

if TYPE_CHECKING:
    from .records import DeadLetter, Delivery

T_co = TypeVar("T_co", covariant=True)

_IN_FLIGHT: Final = DeliveryState.IN_FLIGHT.value
_PENDING: Final = DeliveryState.PENDING.value


class Step(Protocol[T_co]):
    """One thing for a store to do, wholly or not at all; ``Step[T]`` returns a ``T``.

    An *address* is that of a recipient in a namespace, :func:`~.records.address_of`.

    A message that requires all is acknowledged once at least one device has done so, and every
    device that its recipient has by then. What ends as one of :data:`~.records.DEAD` becomes a
    dead letter, and is returned with its body.
    """

    def words(self) -> list[bytes]:
        """Return the name of the step, the number of words that follow, and those words.

        Raises:
            UnicodeEncodeError: UTF-8 cannot represent one of its texts.
        """

    def read(self, answer: Any) -> T_co:
        """Return the result of the step, read from the answer of the script.

        Raises:
            DeliveryFormatError: A record in it was not written by this version.
            ValueError, TypeError, AttributeError, IndexError: Its shape is not that of an answer.
        """


class Stored(NamedTuple):
    """The outcome of :class:`Put`.

    Attributes:
        delivery: The message, with its number; ``None`` if the store is full.
        replaced: The message with the same key whose place it took, if any.
        full: What the store has too much of, see :attr:`.DeliveryStoreFull.reason`; empty if it
            is not full, or does not say.
    """

    delivery: Delivery | None
    replaced: Delivery | None = None
    full: str = ""


class End(NamedTuple):
    """The end of a message.

    Attributes:
        delivery: The message as it ended; ``None`` if the store no longer knows it.
        is_new: Whether it ended by this step.
    """

    delivery: Delivery | None
    is_new: bool


class Page(NamedTuple):
    """Some of the messages that wait for a recipient.

    Attributes:
        deliveries: By number; without those that this version cannot read.
        last: Number of the last one that was looked at; 0 if there was none.
        has_more: Whether there may be others behind it.
    """

    deliveries: list[Delivery]
    last: int
    has_more: bool


class Put(NamedTuple):
    """Store a message, unless the store has it already: :class:`Stored`.

    Attributes:
        delivery: The message.
    """

    delivery: Delivery

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        delivery = self.delivery
        address, text = delivery.address, delivery.to_json()
        key = "" if delivery.key is None else json.dumps([address, delivery.key])
        return _words(
            "put",
            delivery.id,
            text,
            address,
            delivery.event,
            key,
            int(delivery.requires_all),
            delivery.ttl,
            size_in_redis(delivery, text, address, key),
        )

    def read(self, answer: Any) -> Stored:
        """See :class:`Step`."""
        is_open, stored, replaced, *full = answer
        if full:
            return Stored(None, full=full[0].decode())
        if isinstance(stored, int):
            stored = self.delivery.numbered(stored)
        elif stored:
            stored = read_message(stored) if is_open else read_ended(stored)
        return Stored(stored or None, read_ended(replaced) if replaced else None)


class Mark(NamedTuple):
    """Note that a message was sent, or that no client has it at present: ``None``.

    Attributes:
        id: Of the message; nothing happens if it has ended.
        attempts: How often it was sent since the last step about it, >= 0.
        is_in_flight: Whether a client has it now and may acknowledge it.
    """

    id: str
    attempts: int
    is_in_flight: bool

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("mark", self.id, self.attempts, _IN_FLIGHT if self.is_in_flight else _PENDING)

    def read(self, answer: Any) -> None:
        """See :class:`Step`."""


class Acknowledge(NamedTuple):
    """Note that a device has acknowledged a message.

    Returns an :class:`End`, or ``None`` as long as other devices have yet to acknowledge it.

    Attributes:
        id: Of the message.
        device: Session id of the device.
        attempts: How often it was sent since the last step about it, >= 0.
    """

    id: str
    device: str
    attempts: int

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("acknowledge", self.id, self.device, self.attempts)

    def read(self, answer: Any) -> End | None:
        """See :class:`Step`."""
        return None if answer is None else _read_end(answer)


class Finish(NamedTuple):
    """End a message, unless it has ended before: :class:`End`.

    Attributes:
        id: Of the message.
        state: How it ends; one of :data:`~.records.ENDED`.
    """

    id: str
    state: DeliveryState

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("finish", self.id, self.state.value, int(self.state in DEAD))

    def read(self, answer: Any) -> End:
        """See :class:`Step`."""
        return _read_end(answer)


class FailAll(NamedTuple):
    """End the messages that wait at an address, the oldest first: a list of those that ended.

    Attributes:
        address: Of the recipient.
        state: How they end; one of :data:`~.records.ENDED`.
        limit: Messages to end in this step, >= 1.
    """

    address: str
    state: DeliveryState
    limit: int

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        is_dead = int(self.state in DEAD)
        return _words("fail_all", self.address, self.state.value, is_dead, self.limit)

    def read(self, answer: Any) -> list[Delivery]:
        """See :class:`Step`."""
        return read_all_ended(answer)


class Waiting(NamedTuple):
    """Return messages that have not ended, by number: :class:`Page`.

    Attributes:
        address: Of the recipient.
        after: Number above which the page begins, >= 0.
        limit: Messages on the page, >= 1.
        max_size: Bytes of their text, about; a page holds one message of any size.
    """

    address: str
    after: int
    limit: int
    max_size: int

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("waiting", self.address, self.after, self.limit, self.max_size)

    def read(self, answer: Any) -> Page:
        """See :class:`Step`."""
        snapshots, last, has_more = answer
        return Page(readable(read_message, snapshots), int(last), bool(has_more))


class Find(NamedTuple):
    """Return a message, also one that has ended, for as long as it is kept; else ``None``.

    Attributes:
        id: Of the message.
    """

    id: str

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("find", self.id)

    def read(self, answer: Any) -> Delivery | None:
        """See :class:`Step`."""
        is_open, found = answer
        if not found:
            return None
        return read_message(found) if is_open else read_ended(found)


class DeadLetters(NamedTuple):
    """Return the newest dead letters, the newest first: a list.

    Attributes:
        limit: Dead letters to return, >= 1.
    """

    limit: int

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("dead_letters", self.limit)

    def read(self, answer: Any) -> list[DeadLetter]:
        """See :class:`Step`."""
        return readable(read_letter, answer)


class Expire(NamedTuple):
    """End messages whose time to live is over, the earliest first: a list of those that ended.

    Attributes:
        limit: Messages to end in this step, >= 1.
    """

    limit: int

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("expire", self.limit)

    def read(self, answer: Any) -> list[Delivery]:
        """See :class:`Step`."""
        return read_all_ended(answer)


class Join(NamedTuple):
    """Note that an identity has a device: ``None``.

    Attributes:
        address: Of the identity.
        device: Session id of the device.
    """

    address: str
    device: str

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("join", self.address, self.device, json.dumps([self.address, self.device]))

    def read(self, answer: Any) -> None:
        """See :class:`Step`."""


class Leave(NamedTuple):
    """Note that a device is gone: a list of the messages that all others have acknowledged.

    Attributes:
        address: Of the identity.
        device: Session id of the device.
    """

    address: str
    device: str

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("leave", self.address, self.device, json.dumps([self.address, self.device]))

    def read(self, answer: Any) -> list[Delivery]:
        """See :class:`Step`."""
        return read_all_ended(answer)


class Heartbeat(NamedTuple):
    """Note that this process lives; return whether the store still took it for alive.

    Only the Redis store has it, for :meth:`.SharedStore.heartbeat`.

    Attributes:
        patience_ms: Milliseconds until it counts as dead, unless it says so again, >= 1.
        told: Number of the entry of the change feed up to which it has told all ends of its own.
        has_moved: Whether that has changed since the last heartbeat.
    """

    patience_ms: int
    told: int
    has_moved: bool

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("heartbeat", self.patience_ms, self.told, int(self.has_moved))

    def read(self, answer: Any) -> bool:
        """See :class:`Step`."""
        return bool(answer)


class Reap(NamedTuple):
    """Forget devices of another process, and the process when it has none, unless it lives.

    Returns the messages that have ended by that, and how many devices were forgotten. Only the
    Redis store has it, for :meth:`.SharedStore.reap_dead_processes`.

    Attributes:
        host: Name of the process.
        limit: Devices to forget in this step, >= 1.
    """

    host: str
    limit: int

    def words(self) -> list[bytes]:
        """See :class:`Step`."""
        return _words("reap", self.host, self.limit)

    def read(self, answer: Any) -> tuple[list[Delivery], int]:
        """See :class:`Step`."""
        ended, count = answer
        return read_all_ended(ended), count


STEPS: Final[frozenset[type[Any]]] = frozenset(
    (Put, Mark, Acknowledge, Finish, FailAll, Waiting, Find, DeadLetters, Expire, Join, Leave)
)
"""The steps that every store has."""

SHARED_STEPS: Final = STEPS | {Heartbeat, Reap}
"""The steps of the Redis store."""


def not_a_step(given: object) -> TypeError:
    """Return the error of a store that was given something else than one of its steps."""
    return TypeError(f"an object of type {type(given).__name__} is not a step of this store")


def _words(name: str, *arguments: object) -> list[bytes]:
    return list(map(str.encode, map(str, (name, len(arguments), *arguments))))


def _read_end(answer: Any) -> End:
    is_new, ended = answer
    return End(read_ended(ended) if ended else None, is_new=bool(is_new))
