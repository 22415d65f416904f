"""One message of acknowledged delivery, and its retry schedule."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

from ..errors import ConfigError, DeliveryFormatError
from ..states import DeliveryState

FORMAT: Final = 2
"""Version of what :meth:`Delivery.to_json` writes."""

ENDED: Final = frozenset(DeliveryState) - {DeliveryState.PENDING, DeliveryState.IN_FLIGHT}
"""The states that are final."""

DEAD: Final = frozenset({DeliveryState.EXPIRED, DeliveryState.GONE, DeliveryState.REFUSED})
"""The states that make a dead letter: the message did not arrive, and nobody cancelled it."""


MAX_NAMED: Final = 64
"""Devices of one message that a store remembers by their session ids."""

_SHORTEST: Final = 0.01  # seconds; less would keep a core busy with sending


@dataclass(frozen=True)
class Retry:
    """The retry schedule of a message that is not acknowledged.

    After *ack_timeout* an attempt counts as lost, and redelivery follows after a delay that
    doubles with each attempt, with jitter. A recipient that reconnects gets the message at once.

    Attributes:
        ack_timeout: Seconds that the recipient has to acknowledge, >= 0.01.
        first_delay: Seconds until the second attempt, >= 0.01.
        max_delay: Seconds, >= *first_delay*.

    Raises:
        ConfigError: One is out of range.
    """

    ack_timeout: float = 10.0
    first_delay: float = 0.5
    max_delay: float = 30.0

    def __post_init__(self) -> None:
        for value in astuple(self):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ConfigError(f"a delay is a number of seconds, not {value!r}")
            if not _SHORTEST <= value < math.inf:
                raise ConfigError(f"a delay must be at least {_SHORTEST} s, not {value!r}")
        if self.max_delay < self.first_delay:
            raise ConfigError("max_delay must not be less than first_delay")


_DEFAULT_RETRY: Final = Retry()
_retry = lru_cache(maxsize=256)(Retry)  # most messages have the same


def address_of(namespace: str, recipient: str) -> str:
    """Return the name of a recipient that is unique across namespaces.

    A comma ends the name of a namespace in the Socket.IO protocol, too.
    """
    return f"{namespace},{recipient}"


class Delivery(NamedTuple):
    """A snapshot of one message of acknowledged delivery.

    Attributes:
        id: Unique; made of 32 hexadecimal digits.
        recipient: Session id, room or identity.
        event: Name of the event.
        body: JSON text of the list of arguments; empty when it has ended, unless it is dead.
        ttl: Time to live: seconds until it expires.
        namespace: Socket.IO namespace.
        retry: Its retry schedule.
        key: A newer message with the same key and recipient replaces it.
        is_ordered: Whether it waits for earlier ordered messages to the recipient.
        requires_all: Whether all devices of the recipient have to acknowledge it.
        has_id: Whether the recipient gets its id as the last argument, for deduplication.
        number: Its place in the order of all messages; given by the store, from 1 on.
        attempts: How often it was sent.
        state: Pending, in flight, or how it ended.
        acknowledged_by: Session ids of the devices that have acknowledged it, the newest last, at
            most :data:`MAX_NAMED`; only if it requires all.
        acknowledgements: How many devices have acknowledged it, if it requires all.
    """

    id: str
    recipient: str
    event: str
    body: str
    ttl: float
    namespace: str = "/"
    retry: Retry = Retry()
    key: str | None = None
    is_ordered: bool = False
    requires_all: bool = False
    has_id: bool = False
    number: int = 0
    attempts: int = 0
    state: DeliveryState = DeliveryState.PENDING
    acknowledged_by: tuple[str, ...] = ()
    acknowledgements: int = 0

    def __repr__(self) -> str:
        """Leave out the body: it is not meant for the readers of logs."""
        return f"<Delivery {self.id} of {self.event!r}: {self.state}>"

    @property
    def address(self) -> str:
        """The address of its recipient; see :func:`address_of`."""
        return f"{self.namespace},{self.recipient}"

    @property
    def arguments(self) -> list[Any]:
        """The arguments of the event; of messages that have ended, only dead letters have them."""
        arguments: list[Any] = json.loads(self.body or "[]")
        return arguments

    @property
    def size(self) -> int:
        """Bytes that it takes in the memory of a process; rather over- than underestimated."""
        size = 850 + len(self.body) + len(self.event) + 2 * len(self.recipient)
        if self.key is not None:
            size += 150 + 2 * len(self.key)
        return size + 300 if self.requires_all else size

    @property
    def has_ended(self) -> bool:
        """Whether its state is final."""
        return self.state in ENDED

    def to_json(self) -> str:
        """Return the fields that do not change, as text for a store.

        Two lines: a list in JSON, and the body, which is left as it is.
        """
        retry = self.retry
        head = json.dumps(
            [
                FORMAT,
                self.id,
                self.recipient,
                self.event,
                self.namespace,
                [retry.ack_timeout, retry.first_delay, retry.max_delay],
                self.key,
                self.is_ordered,
                self.requires_all,
                self.has_id,
            ]
        )
        return f"{head}\n{self.body}"

    @classmethod
    def from_json(
        cls,
        text: str | bytes,
        *,
        ttl: float,
        number: int,
        attempts: int,
        state: DeliveryState,
    ) -> Delivery:
        """Read what :meth:`to_json` wrote.

        Raises:
            DeliveryFormatError: It is of another version, or was not written by the guard.
        """
        try:
            if isinstance(text, bytes):
                text = text.decode()
            head, is_whole, body = text.partition("\n")
            version, *fixed = json.loads(head)
            if version != FORMAT or not is_whole:
                raise DeliveryFormatError("a message in the store is of another version")
            id, recipient, event, namespace, retry, key, *flags = fixed
            is_ordered, requires_all, has_id = flags
            "".join((id, recipient, event, namespace, key or ""))  # all are texts
            return cls(
                id,
                recipient,
                event,
                body,
                ttl,
                namespace,
                _retry(*retry),
                key,
                bool(is_ordered),
                bool(requires_all),
                bool(has_id),
                number,
                attempts,
                state,
            )
        except (ValueError, TypeError, RecursionError) as exc:
            raise DeliveryFormatError("a message in the store cannot be read") from exc

    @classmethod
    def ended(
        cls,
        id: str,
        address: str,
        event: str,
        number: int,
        attempts: int,
        state: DeliveryState,
        by: tuple[str, ...] = (),
        count: int = 0,
    ) -> Delivery:
        """Return a message that has ended, of which only the receipt is left."""
        namespace, _, recipient = address.partition(",")
        given = (id, recipient, event, "", 0.0, namespace, _DEFAULT_RETRY, None)
        flags = (False, False, False)
        return cls._make((*given, *flags, number, attempts, state, by, count))

    def numbered(self, number: int) -> Delivery:
        """Return a copy with *number*."""
        return Delivery._make((*self[:11], number, *self[12:]))

    def acknowledged(self, by: tuple[str, ...], count: int) -> Delivery:
        """Return a copy with the devices that have acknowledged it."""
        return Delivery._make((*self[:14], by, count))

    def at(self, state: DeliveryState, *, ttl: float, attempts: int, body: str) -> Delivery:
        """Return a copy with what may change over time."""
        words = (self.id, self.recipient, self.event, body, ttl)
        return Delivery._make((*words, *self[5:12], attempts, state, *self[14:]))


class DeadLetter(NamedTuple):
    """A message that did not arrive.

    Attributes:
        delivery: As it was when it was given up.
        died_at: Unix time, in seconds.
    """

    delivery: Delivery
    died_at: float
