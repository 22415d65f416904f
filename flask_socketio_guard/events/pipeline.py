"""What stands around a handler: validation, rate and timeout, in this order from the outside in."""

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
    """A handler, with what is asked for around it.

    Attributes:
        message: Event name.
        function: The handler.
        namespace: Socket.IO namespace; ``None`` is ``"/"``.
        timeout: Longest run, in seconds; ``None`` is no bound.
        is_ordered: Whether a client's events of this name are handled one after another.
        rate: How often a client may send it; ``None`` is no bound.
        rate_per: What *rate* counts together: a key of :data:`RATE_KEYS`.
        validate: Returns the arguments as the handler gets them, or raises
            :class:`~flask_socketio_guard.errors.EventInvalid`.
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
    """What may be asked for around a handler; see :meth:`.SocketIOGuard.on`."""

    timeout: float | None
    ordered: bool
    rate: str | None
    rate_per: RateKey
    schema: object

    def check(self, message: str) -> None:
        """Make sure that the handler of *message* can have them.

        Raises:
            ConfigError: It cannot, or one is out of range.
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
        """Return a handler with these options.

        Raises:
            ConfigError: It would never run, or its schema cannot be used.
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
        """Interrupts handlers that take too long, where it can."""

    def transport_session(self, sid: str) -> str | None:
        """Return the id of a client's transport session; ``None`` if it is gone."""

    def identity_of(self, sid: str) -> str | None:
        """Return whose device a client is, if that was said."""


def pipeline(entry: HandlerEntry, owner: Owner, rates: RateLimiter) -> Callable[..., Any]:
    """Return the handler of *entry* behind what is asked for around it.

    Args:
        entry: See there.
        owner: Knows the owner.
        rates: Keeps the counts of rates.
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
    # Not the session id: a client has a new one each time it joins a namespace again.
    sid: str = flask.request.sid  # type: ignore[attr-defined]
    return owner.transport_session(sid) or sid


def _identity_key(owner: Owner) -> str:
    identity = owner.identity_of(flask.request.sid)  # type: ignore[attr-defined]
    # An identity may be what a client has chosen, the id of another's session for one.
    return _session_key(owner) if identity is None else f"identity:{identity}"


def _address_key(owner: Owner) -> str:
    address = address_key(flask.request.remote_addr or "")
    return f"address:{address}" if address else _session_key(owner)


RATE_KEYS: Final[dict[RateKey, Callable[[Owner], str]]] = {
    "session": _session_key,
    "identity": _identity_key,
    "address": _address_key,
}
"""What a rate counts together, by the names that ``rate_per=`` takes."""
