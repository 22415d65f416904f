"""The exceptions that the guard raises.

Their hierarchy::

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
    """A setting or the order of set-up calls is wrong; the message says how to fix it."""


class IncompatibleVersion(GuardError):
    """An installed package lacks something that the guard relies on."""


class EventRejected(GuardError):
    """An event is rejected, before its handler runs or by the handler itself.

    Message and code are part of the acknowledgement that the client receives, and
    must not contain secrets.

    Args:
        message: Text for the client.
        code: Stable, machine-readable reason for the client; 403 for ``abort(403)``.
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
    """A room cannot be entered, left or closed.

    Examples are ``None``, which means everybody, and the session id of another client.
    """

    def __init__(self, message: str = "invalid room") -> None:
        super().__init__(message, code="invalid_room")


class OutputTooLarge(EventRejected):
    """The return value or an emit of a handler is refused: too much of its output is unsent."""

    def __init__(self, message: str = "the event causes too much output") -> None:
        super().__init__(message, code="output_too_large")


class RateLimited(EventRejected):
    """Events or new connections exceed a rate limit.

    Attributes:
        retry_after: Seconds after which the next one is accepted.
    """

    def __init__(self, message: str = "too many events", *, retry_after: float = 0.0) -> None:
        super().__init__(message, code="rate_limited")
        self.retry_after = retry_after


class HandlerTimeout(GuardError, TimeoutError):
    """An event handler ran longer than its ``timeout``.

    Attributes:
        seconds: The timeout in seconds.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the handler took longer than {seconds:g} s")
        self.seconds = seconds


class ConnectionClosed(GuardError):
    """The client that an operation depends on is gone."""


class LoopQueueFull(GuardError):
    """Other threads schedule more calls on the event loop than it can run."""


class BrokerError(GuardError):
    """The message queue did not answer, refused a request, or the connection to it was lost.

    Attributes:
        category: ``"unreachable"``, ``"name"`` (it does not resolve), ``"tls"``,
            ``"certificate"`` (not trusted), ``"authentication"`` or ``"permission"``.
            Contains no secrets; the message may.
    """

    def __init__(self, reason: str, *, category: str = "unreachable") -> None:
        super().__init__(reason)
        self.category = category


class PublishError(BrokerError):
    """The broker did not acknowledge all messages of a batch.

    Attributes:
        published: Number of messages that were published.
        refused: Number of messages that the broker answered with an error. They must not be
            retried, unlike the rest of the batch.
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
    """The broker answered every message of a batch, some of them with an error."""


class OutboxFull(BrokerError):
    """A message was refused because the outbox is full.

    Attributes:
        messages: Number of messages in the outbox.
        size: Their size in bytes.
    """

    def __init__(self, *, messages: int, size: int) -> None:
        super().__init__(
            f"the outbox is full ({messages} messages, {size} bytes wait for the message queue)"
        )
        self.messages = messages
        self.size = size


class DeliveryError(GuardError):
    """Base of the errors of acknowledged delivery."""


class DeliveryInvalid(DeliveryError, ValueError):
    """A message cannot be stored: it cannot be encoded as JSON in UTF-8, or is too large."""


class DeliveryStoreFull(DeliveryError):
    """The store has reached a bound; the message was not stored.

    Attributes:
        reason: What there is too much of: ``"messages"`` or ``"size"``, which have settings;
            ``"memory"`` if Redis itself is out of memory; empty if the store does not say.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(
            "Redis is out of memory: see its maxmemory"
            if reason == "memory"
            else "too many messages wait: see SOCKETIO_GUARD_DELIVERY_MAX_MESSAGES and "
            "..._MAX_BYTES"
        )
        self.reason = reason


class DeliveryStoreError(DeliveryError):
    """The store did not answer, or failed. It may have stored a message nevertheless."""


class DeliveryFormatError(DeliveryStoreError):
    """The store contains data in a format of another version of the guard; nothing is changed."""


_LONGEST_NAME = 100  # characters


class UnknownDelivery(DeliveryError, LookupError):
    """There is no message with that id, or it ended too long ago.

    Attributes:
        id: The id that was looked up.
    """

    def __init__(self, id: str) -> None:
        name = repr(id)
        if len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}..."
        super().__init__(f"there is no message {name}, or it ended too long ago")
        self.id = id


class TaskError(GuardError):
    """A supervised task cannot be started."""


class DuplicateTask(TaskError):
    """A task with the same name exists already."""


class InvalidTransition(GuardError):
    """A state machine was sent an event that its state does not allow."""

    def __init__(self, state: object, event: object) -> None:
        super().__init__(f"{event} is not allowed in state {state}")
        self.state = state
        self.event = event


def _restore(
    cls: type[GuardError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> GuardError:
    """Restore a pickled error without calling its constructor."""
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(attributes)
    return error
