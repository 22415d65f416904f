"""Registration of event handlers and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from ..checks import require_seconds
from ..clients.handshakes import completing
from ..events.handlers import HandlerCall
from ..events.pipeline import HandlerOptions, RateKey
from ..telemetry.records import Failure
from .guards import Capability

F = TypeVar("F", bound=Callable[..., Any])
BeforeEventT = TypeVar("BeforeEventT", bound=Callable[[HandlerCall], object])
FailureT = TypeVar("FailureT", bound=Callable[[Failure], object])


class Handlers(Capability):
    """Registers event handlers and hooks, before or after ``init_app``."""

    def on(
        self,
        message: str,
        namespace: str | None = None,
        *,
        timeout: float | None = None,
        ordered: bool = False,
        rate: str | None = None,
        rate_per: RateKey = "session",
        schema: object = None,
    ) -> Callable[[F], F]:
        """Register an event handler; like ``SocketIO.on``, but usable before ``init_app``.

        Args:
            message: Event name.
            namespace: Socket.IO namespace; ``None`` means ``"/"``.
            timeout: Longest run of the handler in seconds, > 0. After that, the
                client receives an error acknowledgement with code ``"timeout"``.
                Under gevent the handler is interrupted when it next blocks; a
                thread cannot be interrupted and continues, and its result is ignored.
            ordered: Whether a client's events of this name are handled one after
                another, in order of arrival.
            rate: Rate limit per client, such as ``"20/second"``. Events beyond it
                are acknowledged with an error with code ``"rate_limited"``.
            rate_per: What *rate* is counted by. ``"session"``: a client's transport session, which
                outlasts leaving and rejoining a namespace. ``"identity"``: the client's identity
                (:meth:`identify`), or its session until it has one. ``"address"``: its network
                address as the application sees it (behind a proxy, use Werkzeug's ``ProxyFix``),
                or its session if there is none.
            schema: The type of the arguments: a pydantic model, any type that
                pydantic supports (a dataclass, a TypedDict, ``list[int]``), a
                tuple of types for several arguments, or ``True`` for the
                handler's own annotations. The handler receives validated values;
                an event that does not match is rejected with code ``"invalid"``.

        Raises:
            ConfigError: An option is out of range, or the library that it needs
                is not installed.
        """
        options = HandlerOptions(timeout, ordered, rate, rate_per, schema)
        options.check(message)

        def decorator(handler: F) -> F:
            self._guards.register_handler(options.entry(message, handler, namespace))
            return handler

        return decorator

    @overload
    def event(self, handler: F, /) -> F: ...

    @overload
    def event(
        self,
        namespace: str | None = None,
        /,
        *,
        timeout: float | None = None,
        ordered: bool = False,
        rate: str | None = None,
        rate_per: RateKey = "session",
        schema: object = None,
    ) -> Callable[[F], F]: ...

    @overload
    def event(
        self,
        *,
        namespace: str | None = None,
        timeout: float | None = None,
        ordered: bool = False,
        rate: str | None = None,
        rate_per: RateKey = "session",
        schema: object = None,
    ) -> Callable[[F], F]: ...

    def event(self, *args: Any, **kwargs: Any) -> Any:
        """Register an event handler under the name of the function; like ``SocketIO.event``.

        Takes the namespace and the keywords of :meth:`on`, and works without parentheses too.
        """
        if len(args) == 1 and not kwargs and callable(args[0]):
            return self.on(args[0].__name__)(args[0])
        return lambda handler: self.on(handler.__name__, *args, **kwargs)(handler)

    def on_event(
        self,
        message: str,
        handler: Callable[..., Any],
        namespace: str | None = None,
        *,
        timeout: float | None = None,
        ordered: bool = False,
        rate: str | None = None,
        rate_per: RateKey = "session",
        schema: object = None,
    ) -> None:
        """Register an event handler without a decorator; takes the keywords of :meth:`on`."""
        self.on(
            message,
            namespace,
            timeout=timeout,
            ordered=ordered,
            rate=rate,
            rate_per=rate_per,
            schema=schema,
        )(handler)

    def handshake(
        self,
        message: str,
        namespace: str | None = None,
        *,
        timeout: float = 10.0,
        ordered: bool = False,
        rate: str | None = None,
        rate_per: RateKey = "session",
        schema: object = None,
    ) -> Callable[[F], F]:
        """Register the handler of the application's own handshake.

        A client of *namespace* is ready once the handler has returned anything
        but ``False``; a client that is not ready after *timeout* seconds is disconnected.
        ``guard.emit(..., ready_only=True)`` reaches only clients that are ready.

        Args:
            message: Name of the event that a client sends first.
            namespace: Socket.IO namespace; ``None`` means ``"/"``.
            timeout: Seconds after the connect handler has accepted the client, > 0.
            ordered: See :meth:`on`.
            rate: See :meth:`on`.
            rate_per: See :meth:`on`.
            schema: See :meth:`on`.

        Raises:
            ConfigError: The namespace already has a handshake, or see :meth:`on`.
        """
        require_seconds("timeout", timeout)
        options = HandlerOptions(None, ordered, rate, rate_per, schema)
        options.check(message)
        self._guards.register_handshake(namespace or "/", timeout)

        def decorator(handler: F) -> F:
            entry = options.entry(message, handler, namespace)
            shaking = completing(handler, lambda sid: self._guards.current().connections.find(sid))
            self._guards.register_handler(entry._replace(function=shaking))
            return handler

        return decorator

    def before_event(self, hook: BeforeEventT) -> BeforeEventT:
        """Call *hook* before every handler, connect and disconnect handlers included.

        The hook receives a :class:`HandlerCall` and runs in the handler's request context.
        If it raises :class:`.EventRejected`, the handler does not run and the client
        receives the error (a connection is refused).
        """
        self._guards.registry.before_event.append(hook)
        return hook

    def on_failure(self, hook: FailureT) -> FailureT:
        """Call *hook* once for every failure of a handler, callback or task.

        The hook receives a :class:`.Failure` and must not block.
        """
        self._guards.registry.on_failure.append(hook)
        return hook
