"""The wrappers around a handler, from the outside in: rate limit, validation, timeout."""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, TypeAlias

import flask

from ..checks import require_plain, require_seconds
from ..core.addresses import address_key
from ..errors import ConfigError
from .schema import validator

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.runtime import Runtime
    from .rates import Limit, RateLimiter

RateKey: TypeAlias = Literal["session", "identity", "address"]


class HandlerEntry(NamedTuple):
    """A handler with its options.

    Attributes:
        message: Event name.
        function: The handler.
        namespace: Socket.IO namespace; ``None`` means ``"/"``.
        timeout: Longest run in seconds; ``None`` means no limit.
        is_ordered: Whether a client's events of this name are handled one after another.
        rate: Rate limit, such as ``"20/second"``; ``None`` means no limit.
        rate_per: What *rate* is counted by: a key of :data:`RATE_KEYS`.
        validate: Returns the arguments to call the handler with, or raises
            :class:`~flask_socketio_guard.errors.EventInvalid`; ``None`` means no validation.
    """

    message: str
    function: Callable[..., Any]
    namespace: str | None
    timeout: float | None
    is_ordered: bool
    rate: str | None
    rate_per: RateKey
    validate: Callable[[tuple[object, ...]], tuple[object, ...]] | None


class HandlerOptions(NamedTuple):
    """The options of a handler; see :meth:`.SocketIOGuard.on`."""

    timeout: float | None
    ordered: bool
    rate: str | None
    rate_per: RateKey
    schema: object

    def check(self, message: str) -> None:
        """Check that the options are valid for a handler of *message*.

        Raises:
            ConfigError: An option is out of range or not allowed for this event.
        """
        if self.timeout is not None:
            require_seconds("timeout", self.timeout)
        has_more = self.ordered or self.rate is not None or self.schema is not None
        if has_more and message in ("connect", "disconnect"):
            raise ConfigError(f"ordered, rate and schema are not for {message!r} handlers")
        if self.rate_per not in RATE_KEYS:
            choices = ", ".join(map(repr, RATE_KEYS))
            raise ConfigError(f"rate_per must be one of {choices}, not {self.rate_per!r}")

    def entry(
        self, message: str, handler: Callable[..., Any], namespace: str | None
    ) -> HandlerEntry:
        """Combine a handler with these options.

        Raises:
            ConfigError: *handler* is a coroutine function, or its schema cannot be used.
        """
        require_plain(f"the handler of {message!r}", handler)
        return HandlerEntry(
            message,
            handler,
            namespace,
            self.timeout,
            self.ordered,
            self.rate,
            self.rate_per,
            None if self.schema is None else validator(self.schema, handler),
        )


class Owner(Protocol):
    """The guard of the application; a forked child has another runtime than its parent."""

    @property
    def runtime(self) -> Runtime:
        """Interrupts handlers at their timeout, where the runtime can."""

    def transport_session(self, sid: str) -> str | None:
        """Return the id of a client's transport session; ``None`` if it is gone."""

    def identity_of(self, sid: str) -> str | None:
        """Return the identity that the application has set for a client, if any."""


def pipeline(entry: HandlerEntry, owner: Owner, rates: RateLimiter) -> Callable[..., Any]:
    """Return the handler of *entry*, wrapped according to its options.

    Args:
        entry: The handler and its options.
        owner: Provides the runtime and the keys of rate limits.
        rates: Makes the rate limits.
    """
    target = entry.function
    if entry.timeout is not None:
        target = _with_timeout(owner, target, entry.timeout)
    if entry.validate is not None:
        target = _with_schema(target, entry.validate)
    if entry.rate is not None:
        name = f"{entry.namespace or '/'} {entry.message}"
        key_of = partial(RATE_KEYS[entry.rate_per], owner)
        target = _with_rate(target, rates.limit(entry.rate, name=name), key_of)
    return target


def _with_timeout(owner: Owner, handler: Callable[..., Any], timeout: float) -> Callable[..., Any]:
    @wraps(handler)
    def limited(*args: Any) -> Any:
        return owner.runtime.call_with_timeout(lambda: handler(*args), timeout)

    return limited


def _with_schema(
    handler: Callable[..., Any], validate: Callable[[tuple[object, ...]], tuple[object, ...]]
) -> Callable[..., Any]:
    @wraps(handler)
    def validated(*args: Any) -> Any:
        return handler(*validate(args))

    return validated


def _with_rate(
    handler: Callable[..., Any], limit: Limit, key_of: Callable[[], str]
) -> Callable[..., Any]:
    @wraps(handler)
    def rated(*args: Any) -> Any:
        limit.hit(key_of())
        return handler(*args)

    return rated


def _session_key(owner: Owner) -> str:
    # Not the session id: a client gets a new one each time it reconnects to a namespace.
    sid: str = flask.request.sid  # type: ignore[attr-defined]
    return owner.transport_session(sid) or sid


def _identity_key(owner: Owner) -> str:
    identity = owner.identity_of(flask.request.sid)  # type: ignore[attr-defined]
    # A client may choose its identity, for example the id of another client's session: the prefix
    # keeps the two kinds of key apart.
    return _session_key(owner) if identity is None else f"identity:{identity}"


def _address_key(owner: Owner) -> str:
    address = address_key(flask.request.remote_addr or "")
    return f"address:{address}" if address else _session_key(owner)


RATE_KEYS: Final[dict[RateKey, Callable[[Owner], str]]] = {
    "session": _session_key,
    "identity": _identity_key,
    "address": _address_key,
}
"""Functions that return the key to count an event by, for each value of ``rate_per=``."""
