"""Every exception that the guard raises.

The tree::

    GuardError
    ├── ConfigError (also ValueError)
    ├── IncompatibleVersion
    ├── EventRejected
    │   ├── EventInvalid
    │   │   └── RoomInvalid (also ValueError)
    │   ├── OutputTooLarge
    │   └── RateLimited
    ├── HandlerTimeout (also TimeoutError)
    ├── ConnectionClosed
    ├── LoopQueueFull
    ├── BrokerError
    │   ├── PublishError
    │   │   └── PublishRefused
    │   └── OutboxFull
    ├── DeliveryError
    │   ├── DeliveryInvalid (also ValueError)
    │   ├── DeliveryStoreFull
    │   ├── DeliveryStoreError
    │   │   └── DeliveryFormatError
    │   └── UnknownDelivery (also LookupError)
    ├── TaskError
    │   └── DuplicateTask
    └── InvalidTransition
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BrokerError",
    "ConfigError",
    "ConnectionClosed",
    "DeliveryError",
    "DeliveryFormatError",
    "DeliveryInvalid",
    "DeliveryStoreError",
    "DeliveryStoreFull",
    "DuplicateTask",
    "EventInvalid",
    "EventRejected",
    "GuardError",
    "HandlerTimeout",
    "IncompatibleVersion",
    "InvalidTransition",
    "LoopQueueFull",
    "OutboxFull",
    "OutputTooLarge",
    "PublishError",
    "RateLimited",
    "RoomInvalid",
    "TaskError",
    "UnknownDelivery",
]


class GuardError(Exception):
    """Base of every error that the guard raises. All of them can be pickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.args, self.__dict__)


class ConfigError(GuardError, ValueError):
    """A setting or the order of set-up calls is wrong; the text names the mend."""


class IncompatibleVersion(GuardError):
    """An installed package lacks something that the guard relies on."""


class EventRejected(GuardError):
    """An event is refused before its handler runs, or by the handler itself.

    The client is told: text and code are part of the acknowledgement, so they
    must not hold secrets.

    Args:
        message: Shown to the client.
        code: Stable, machine-readable reason, shown to the client; an ``abort(403)`` has 403.
    """

    def __init__(self, message: str = "event rejected", *, code: str | int = "rejected") -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class EventInvalid(EventRejected):
    """An event breaks the protocol or carries a reserved name."""

    def __init__(self, message: str = "invalid event", *, code: str = "invalid") -> None:
        super().__init__(message, code=code)


class RoomInvalid(EventInvalid, ValueError):
    """A room is no name that a client may enter, leave or have closed.

    Such as ``None``, which stands for everybody, or the session id of another client.
    """

    def __init__(self, message: str = "invalid room") -> None:
        super().__init__(message, code="invalid_room")


class OutputTooLarge(EventRejected):
    """An answer or an emit of a handler is refused: its event has caused too much at a time."""

    def __init__(self, message: str = "the event causes too much") -> None:
        super().__init__(message, code="output_too_large")


class RateLimited(EventRejected):
    """A client sends events, or new clients come, faster than they may.

    Attributes:
        retry_after: Seconds after which the next one is let through.
    """

    def __init__(self, message: str = "too many events", *, retry_after: float = 0.0) -> None:
        super().__init__(message, code="rate_limited")
        self.retry_after = retry_after


class HandlerTimeout(GuardError, TimeoutError):
    """An event handler ran longer than its ``timeout``.

    Attributes:
        seconds: The timeout, in seconds.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the handler took longer than {seconds:g} s")
        self.seconds = seconds


class ConnectionClosed(GuardError):
    """The client that an operation depends on is gone."""


class LoopQueueFull(GuardError):
    """Other threads hand over more than the event loop gets to."""


class BrokerError(GuardError):
    """The message queue did not answer, refused, or the connection to it was lost.

    Attributes:
        category: ``"unreachable"``, ``"name"`` (it does not resolve), ``"tls"``,
            ``"certificate"`` (not trusted), ``"authentication"`` or ``"permission"``.
            Without secrets, unlike the text perhaps.
    """

    def __init__(self, reason: str, *, category: str = "unreachable") -> None:
        super().__init__(reason)
        self.category = category


class PublishError(BrokerError):
    """A batch of messages was not, or not wholly, acknowledged by the broker.

    Attributes:
        published: Messages that went out.
        refused: Messages that the broker answered with an error; they never will.
            The rest of the batch, in order, may be tried again.
    """

    def __init__(
        self,
        reason: str,
        *,
        published: int = 0,
        refused: int = 0,
        category: str = "unreachable",
    ) -> None:
        super().__init__(reason, category=category)
        self.published = published
        self.refused = refused


class PublishRefused(PublishError):
    """The broker answered the whole batch, and refused some of it."""


class OutboxFull(BrokerError):
    """A message was refused because the outbox has reached its bound.

    Attributes:
        messages: Messages waiting.
        size: Bytes waiting.
    """

    def __init__(self, *, messages: int, size: int) -> None:
        super().__init__(
            f"the outbox is full ({messages} messages, {size} bytes wait for the message queue)"
        )
        self.messages = messages
        self.size = size


class DeliveryError(GuardError):
    """The base of errors of acknowledged delivery."""


class DeliveryInvalid(DeliveryError, ValueError):
    """A message cannot be stored: JSON cannot hold it, or it is too large."""


class DeliveryStoreFull(DeliveryError):
    """The store has reached its bound; the message was not stored."""


class DeliveryStoreError(DeliveryError):
    """The store did not answer, or could not do it. A message may be stored all the same."""


class DeliveryFormatError(DeliveryStoreError):
    """The store holds what this version of the guard did not write; it is left as it is."""


_LONGEST_NAME = 100  # characters


class UnknownDelivery(DeliveryError, LookupError):
    """There is no message with that id, or it ended too long ago.

    Attributes:
        id: What was asked for.
    """

    def __init__(self, id: str) -> None:
        name = repr(id)
        if len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}..."
        super().__init__(f"there is no message {name}, or it ended too long ago")
        self.id = id


class TaskError(GuardError):
    """Something is wrong with a supervised task."""


class DuplicateTask(TaskError):
    """A task of the same name is already watched."""


class InvalidTransition(GuardError):
    """A state machine was sent an event that its state does not allow."""

    def __init__(self, state: object, event: object) -> None:
        super().__init__(f"{event} is not allowed in state {state}")
        self.state = state
        self.event = event


def _restore(
    cls: type[GuardError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> GuardError:
    """Make a pickled error anew, past its constructor."""
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(attributes)
    return error
