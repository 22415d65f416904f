"""The arguments of ``deliver``, checked before anything is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from ..checks import (
    arguments_of,
    namespace_of,
    require_flag,
    require_hook,
    require_seconds,
    require_text,
)
from ..errors import ConfigError
from .records import Retry

if TYPE_CHECKING:
    from collections.abc import Callable

    from .receipts import Receipt

Requirement: TypeAlias = Literal["any", "all"]

_RESERVED: Final = frozenset(
    ("connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener")
)
"""Event names that Socket.IO clients reserve."""


class DeliveryRequest(NamedTuple):
    """One call of ``deliver``.

    Attributes:
        event: Event name.
        arguments: Of the event; not encoded yet.
        recipient: A session id, a room, or an identity.
        ttl: Time to live in seconds; ``None`` takes the setting.
        namespace: Socket.IO namespace.
        retry: Retry schedule; ``None`` takes the setting.
        key: Replaces the message with the same key to the same recipient.
        is_ordered: Whether it waits for earlier ordered messages to the recipient.
        requires_all: Whether each device of the recipient has to acknowledge it.
        has_id: Whether the client gets the id of the message, for deduplication.
        on_delivered: Called with the receipt.
        on_expired: Called with the receipt.
    """

    event: str
    arguments: list[Any]
    recipient: str
    ttl: float | None
    namespace: str
    retry: Retry | None
    key: str | None
    is_ordered: bool
    requires_all: bool
    has_id: bool
    on_delivered: Callable[[Receipt], object] | None
    on_expired: Callable[[Receipt], object] | None


def delivery_request(
    event: str,
    args: tuple[Any, ...],
    *,
    to: str,
    ttl: float | None,
    retry: Retry | None,
    key: str | None,
    ordered: bool,
    require: Requirement,
    with_id: bool,
    namespace: str | None,
    on_delivered: Callable[[Receipt], object] | None,
    on_expired: Callable[[Receipt], object] | None,
) -> DeliveryRequest:
    """Check the arguments of ``deliver``, which may come from anywhere.

    Raises:
        ConfigError: One is of the wrong type, or out of range.
        DeliveryInvalid: UTF-8 cannot represent a name.
        TypeError: There are several payloads.
    """
    require_text("event", event)
    require_text("to", to)
    if key is not None:
        require_text("key", key)
    if event in _RESERVED:
        raise ConfigError(f"the clients of Socket.IO keep the event {event!r} for themselves")
    if require not in ("any", "all"):
        raise ConfigError(f"require must be 'any' or 'all', not {require!r}")
    require_flag("ordered", ordered)
    require_flag("with_id", with_id)
    require_hook("on_delivered", on_delivered)
    require_hook("on_expired", on_expired)
    if ttl is not None:
        require_seconds("ttl", ttl)
    if retry is not None and not isinstance(retry, Retry):
        raise ConfigError(f"retry must be a Retry, not {retry!r}")
    return DeliveryRequest(
        event,
        arguments_of(args),
        to,
        ttl,
        namespace_of(namespace),
        retry,
        key,
        ordered,
        require == "all",
        with_id,
        on_delivered,
        on_expired,
    )


def require_limit(limit: object) -> None:
    """Make sure that *limit* is a number of entries, >= 1.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ConfigError(f"limit must be an integer >= 1, not {limit!r}")
