"""Handlers of events, and hooks around them."""

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
    """Registers what runs when a client sends something, before ``init_app`` and after."""

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
        """Register an event handler; as ``SocketIO.on``, and before ``init_app`` too.

        Args:
            message: Event name.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.
            timeout: Longest run of the handler, in seconds, > 0. When it is
                over the client gets an error acknowledgement with code
                ``"timeout"``. Under gevent the handler is interrupted at its next
                wait; a thread cannot be, so under threading it runs on unheard.
            ordered: Whether a client's events of this name are handled one after
                another, in the order in which they came.
            rate: How often a client may send it, such as ``"20/second"``; beyond
                that the acknowledgement is an error with code ``"rate_limited"``.
            rate_per: Whose events *rate* counts together: those of one ``"session"``, which is a
                client's transport and outlasts leaving and joining a namespace; of one
                ``"identity"`` (:meth:`identify`; of the session until it has one); or of one
                ``"address"``, as the application sees it (behind a proxy: with Werkzeug's
                ``ProxyFix``; of the session where there is none).
            schema: What the arguments must be: a pydantic model, any type that
                pydantic understands (a dataclass, a TypedDict, ``list[int]``), a
                tuple of these for several arguments, or ``True`` for the
                handler's own annotations. The handler gets validated values;
                what does not fit is refused with code ``"invalid"``.

        Raises:
            ConfigError: An option is out of range, or the library behind it is
                not installed.
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
        """Register an event handler under the name of the function; as ``SocketIO.event``.

        Takes the namespace and the keywords of :meth:`on`. Usable with and without parentheses.
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

        A client of *namespace* is ``ready`` once the handler has returned anything
        but ``False``; one that is not after *timeout* seconds is disconnected.
        ``guard.emit(..., ready_only=True)`` reaches only those that are ready.

        Args:
            message: Name of the event that a client sends first.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.
            timeout: In seconds after the connect handler has let it in, > 0.
            ordered: See :meth:`on`.
            rate: See :meth:`on`.
            rate_per: See :meth:`on`.
            schema: See :meth:`on`.

        Raises:
            ConfigError: The namespace has a handshake already, or see :meth:`on`.
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

        It runs in the handler's request context, with a :class:`HandlerCall`. It may
        raise :class:`.EventRejected`: then the handler does not run, and the
        client is told (a connect is refused).
        """
        self._guards.registry.before_event.append(hook)
        return hook

    def on_failure(self, hook: FailureT) -> FailureT:
        """Call *hook* once for every failure, of handlers, callbacks and tasks alike.

        It gets a :class:`.Failure`, and must not block.
        """
        self._guards.registry.on_failure.append(hook)
        return hook
