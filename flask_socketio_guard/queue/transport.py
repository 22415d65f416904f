"""What outbox and listener ask of a message queue, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..errors import BrokerError


class QueueMessage(NamedTuple):
    """One message to other processes.

    Attributes:
        sequence: Grows by one with each message of this process, from 1.
        payload: The message as JSON object text, UTF-8.
    """

    sequence: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe that came back, with its token."""

    token: int


Arrival = bytes | str | dict[str, object] | Probe
"""What a subscription yields: a message as it came, or a probe of this process."""

SEQUENCE_KEY = "guard_seq"
"""Key of a message's sequence number; peers without the guard ignore it."""

SEQUENCE_MARK = b', "guard_seq": '
"""What stands in front of the sequence number on the wire."""


class Publisher(Protocol):
    """The way out to the broker. Used by one task at a time."""

    def publish(self, messages: Sequence[QueueMessage], probe: int | None) -> int | None:
        """Publish in order and wait until the broker has taken all of it.

        Args:
            messages: May be empty.
            probe: Token of a probe to publish as well.

        Returns:
            How many subscribers the channel has, or ``None`` if unknown.

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
        """Whether a message is on its way at this moment, so that a probe may be behind it."""

    def read(self, timeout: float) -> Sequence[Arrival]:
        """Return what has arrived, waiting up to *timeout* seconds for the first.

        Raises:
            BrokerError: The connection was lost.
        """

    def close(self) -> None:
        """End it; a :meth:`read` under way elsewhere returns or raises soon. Idempotent."""


class Transport(Protocol):
    """A message queue."""

    name: str

    @property
    def is_probing(self) -> bool:
        """Whether probes go the way of messages, and not only over the listener's connection."""

    def publisher(self, is_answering: Callable[[], bool]) -> Publisher:
        """Return the way out; connects at its first use.

        Args:
            is_answering: Asked when an answer is long in coming: whether the
                broker answers over a fresh connection.
        """

    def subscribe(self) -> Subscription:
        """Subscribe over a new connection.

        Raises:
            BrokerError: The broker cannot be reached or refused.
        """

    def check(self) -> BrokerError | None:
        """Ask the broker over a fresh connection, in bounded time.

        Returns:
            ``None`` if it answered, else what went wrong, without secrets.
        """
