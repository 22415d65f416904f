"""The interface between outbox and listener and any kind of message queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..errors import BrokerError


class QueueMessage(NamedTuple):
    """One message to other processes.

    Attributes:
        sequence: Number of the message within this process, from 1.
        payload: The message as JSON object text, UTF-8.
    """

    sequence: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe that came back, with its token."""

    token: int


Arrival = bytes | str | dict[str, object] | Probe
"""An item from a subscription: a message in any encoding, or a probe of this process."""

SEQUENCE_KEY = "guard_seq"
"""Key of a message's sequence number; peers without the guard ignore it."""

SEQUENCE_MARK = b', "guard_seq": '
"""The bytes in front of the sequence number on the wire."""


class Publisher(Protocol):
    """Publishes to the broker. Used by one task at a time."""

    def publish(self, messages: Sequence[QueueMessage], probe: int | None) -> int | None:
        """Publish in order and wait until the broker has acknowledged everything.

        Args:
            messages: May be empty.
            probe: Token of a probe to publish as well, if any.

        Returns:
            Number of subscribers of the channel, or ``None`` if unknown.

        Raises:
            PublishError: The connection was lost.
            PublishRefused: The broker answered some messages with an error.
        """

    def close(self) -> None:
        """Drop the connection; the next :meth:`publish` makes a new one."""


class Subscription(Protocol):
    """One subscription to the channel, over a connection of its own."""

    @property
    def is_receiving(self) -> bool:
        """Whether part of a message has arrived, which may delay a probe behind it."""

    def read(self, timeout: float) -> Sequence[Arrival]:
        """Return the items that have arrived; wait up to *timeout* seconds for the first.

        Raises:
            BrokerError: The connection was lost.
        """

    def close(self) -> None:
        """Close the connection; a :meth:`read` in another task ends soon. Idempotent."""


class Transport(Protocol):
    """A message queue."""

    name: str

    @property
    def is_probing(self) -> bool:
        """Whether probes are published like messages.

        If not, they only prove the listener's connection.
        """

    def publisher(self, is_answering: Callable[[], bool]) -> Publisher:
        """Return a publisher, which connects at its first use.

        Args:
            is_answering: Returns whether the broker answers over a new connection;
                called when an acknowledgement is late.
        """

    def subscribe(self) -> Subscription:
        """Subscribe over a new connection.

        Raises:
            BrokerError: The broker is unreachable or refuses the subscription.
        """

    def check(self) -> BrokerError | None:
        """Ask the broker over a new connection, in bounded time.

        Returns:
            ``None`` if it answered, otherwise the error, without secrets.
        """
