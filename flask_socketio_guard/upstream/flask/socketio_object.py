"""The guarded side of ``flask_socketio.SocketIO``."""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import flask
import flask_socketio

from ...checks import require_plain
from ..overrides import is_guarded
from ..socketio.recipients import marked
from ..socketio.server import GuardedServer
from .event_context import EventContexts, untie_route_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_socketio import SocketIO as _SocketIO
else:
    _SocketIO = object


class GuardedSocketIO(_SocketIO):
    """Goes in front of ``SocketIO``; every handler passes through here."""

    event_contexts: EventContexts
    known_events: set[tuple[str, str]]
    """Namespace and name of all that has had a handler on a server of this object."""
    initialised: Callable[[Any, Any], object] = staticmethod(lambda *_: None)
    """Called with this object and the application when it has got a new server."""

    def init_app(self, app: Any, **kwargs: Any) -> None:
        """Initialise it, for another application or anew; as upstream's.

        Upstream makes a new server, which the guard has to be told of, unless an ``init_app()``
        of the application has had that guarded by then.
        """
        super().init_app(app, **kwargs)
        if not is_guarded(type(self.server)):
            self.initialised(self, app)

    def on(
        self, message: str, namespace: str | None = None
    ) -> Callable[[Callable[..., object]], Callable[..., object]]:
        """Register an event handler; as upstream's, but refuse one that would never run."""
        register = super().on(message, namespace=namespace)

        def decorator(handler: Callable[..., object]) -> Callable[..., object]:
            require_plain(f"the handler of {message!r}", handler)
            registered: Callable[..., object] = register(handler)
            self.known_events.add((namespace or "/", message))
            return registered

        return decorator

    def on_namespace(self, namespace_handler: Any) -> None:
        """Register a class-based namespace; as upstream's, see :meth:`on`."""
        require_plain_methods(namespace_handler)
        super().on_namespace(namespace_handler)

    def on_error(
        self, namespace: str | None = None
    ) -> Callable[[Callable[..., object]], Callable[..., object]]:
        """Register an error handler; as upstream's, see :meth:`on`."""
        register = super().on_error(namespace)

        def decorator(handler: Callable[..., object]) -> Callable[..., object]:
            require_plain("the error handler", handler)
            registered: Callable[..., object] = register(handler)
            return registered

        return decorator

    def on_error_default(self, exception_handler: Callable[..., object]) -> Any:
        """Register the default error handler; as upstream's, see :meth:`on`."""
        require_plain("the default error handler", exception_handler)
        return super().on_error_default(exception_handler)

    def _handle_event(
        self,
        handler: Callable[..., object],
        message: str | None,
        namespace: str,
        sid: str,
        *args: object,
    ) -> object:
        server: Any = self.server
        if not isinstance(server, GuardedServer):
            # It was initialised for another application, which has no guard.
            return super()._handle_event(handler, message, namespace, sid, *args)
        protected = server.guard.handlers.protect(handler, message)
        environ = server.get_environ(sid, namespace=namespace)
        if not environ and message is None:
            # The callback of a client that has left: upstream would drop it in
            # silence. It has no request any more, but its answer came.
            return protected(*args)
        contexts = self.event_contexts
        if environ and contexts.is_fast:
            return contexts.call(protected, message, namespace, sid, args, environ)

        def in_context(*arguments: object) -> object:
            untie_route_error(flask.request)
            return protected(*arguments)

        return super()._handle_event(in_context, message, namespace, sid, *args)

    def emit(self, event: str, *args: object, **kwargs: Any) -> None:
        """Emit an event; as ``SocketIO.emit``, but only ``to=None`` is everybody."""
        callback = kwargs.get("callback")
        if callback is not None:
            # Here, where it is not yet hidden in upstream's own.
            require_plain("the callback", callback)
        to = kwargs.get("to")
        if not to and (to is not None or not kwargs.get("room", True)):
            kwargs = self._marked(kwargs)
        super().emit(event, *args, **kwargs)

    def call(self, event: str, *args: object, **kwargs: Any) -> Any:
        """Emit to one client and wait for its answer; as ``SocketIO.call``."""
        return super().call(event, *args, **self._marked(kwargs))

    def _marked(self, options: dict[str, Any]) -> dict[str, Any]:
        changed = marked(options)
        if changed is options or isinstance(self.server, GuardedServer):
            return changed
        return options  # the server is that of another application, without a guard

    def in_present_request(self, function: Callable[..., object]) -> Callable[..., object]:
        """Return *function* such that it runs in the request context of the present event.

        Without an event in progress it is returned as it is, as upstream's ``emit`` does.
        """
        sid = getattr(flask.request, "sid", None) if flask.has_request_context() else None
        if sid is None:
            return function
        namespace = flask.request.namespace  # type: ignore[attr-defined]
        return partial(self._handle_event, function, None, namespace, sid)

    def start_background_task(
        self, target: Callable[..., object], *args: object, **kwargs: object
    ) -> Any:
        """Start a background task; what it raises is recorded.

        Takes and returns what ``SocketIO.start_background_task`` does.
        """
        server: Any = self.server
        if isinstance(server, GuardedServer):
            target = server.guard.handlers.recording(target)
        return super().start_background_task(target, *args, **kwargs)


def mend_recipients() -> None:
    """Let ``flask_socketio.emit``, ``send`` and ``call`` hand on whom they were given.

    They drop a recipient that is false before anything of the application's sees it. Handlers
    have imported these functions by name, and so it is their code that is replaced.
    """
    if not _originals:
        vars(flask_socketio)["_socketio_guard_call"] = _socketio_guard_call
        for mended in (emit, send, call):
            name = mended.__name__
            function = getattr(flask_socketio, name)
            _originals[name] = FunctionType(
                function.__code__, function.__globals__, name, function.__defaults__
            )
            function.__code__ = mended.__code__


_originals: dict[str, Callable[..., Any]] = {}


def _socketio_guard_call(name: str, first: object, args: Any, options: dict[str, Any]) -> Any:
    # An application without the guard gets what it always got.
    socketio = flask.current_app.extensions["socketio"]
    if isinstance(socketio.server, GuardedServer):
        options = marked(options)
    return _originals[name](first, *args, **options)


def emit(event: Any, *args: Any, **kwargs: Any) -> Any:
    """Emit an event; this code, and that below, runs among the globals of flask_socketio."""
    return _socketio_guard_call("emit", event, args, kwargs)


def call(event: Any, *args: Any, **kwargs: Any) -> Any:
    """Emit to one client and wait for its answer."""
    return _socketio_guard_call("call", event, args, kwargs)


def send(message: Any, **kwargs: Any) -> Any:
    """Send a message."""
    return _socketio_guard_call("send", message, (), kwargs)


def require_plain_methods(namespace: Any) -> None:
    """Make sure that the handlers of a class-based namespace run.

    Raises:
        ConfigError: One would not.
    """
    for name in dir(type(namespace)):
        if name.startswith("on_") or name == "error":
            require_plain(f"{type(namespace).__name__}.{name}", getattr(namespace, name))


def require_plain_handlers(socketio: Any) -> None:
    """Make sure that what was registered before the guard came runs.

    Raises:
        ConfigError: A handler would not.
    """
    server = socketio.server
    for handlers in server.handlers.values():
        for event, handler in handlers.items():
            is_enclosed = getattr(handler, "__globals__", None) is vars(flask_socketio)
            function = getattr(handler, "__wrapped__", handler) if is_enclosed else handler
            require_plain(f"the handler of {event!r}", function)
    for namespace in server.namespace_handlers.values():
        require_plain_methods(namespace)
    for handler in (*socketio.exception_handlers.values(), socketio.default_exception_handler):
        require_plain("an error handler", handler)


def is_socketio(value: object) -> bool:
    """Say whether *value* is a ``SocketIO``."""
    return isinstance(value, flask_socketio.SocketIO)


def note_handlers(socketio: Any) -> None:
    """Note what the server of *socketio* has handlers for, for the next one."""
    known: set[tuple[str, str]] = vars(socketio).setdefault("known_events", set())
    known.update(_events(socketio.server))


def take_lost_handlers(socketio: Any) -> str:
    """Name the events that lost their handlers when *socketio* got its present server; once.

    ``SocketIO.on`` registers with the server of the moment, if there is one, and only there:
    what came after an ``init_app`` is unknown to the next.
    """
    lost = socketio.known_events.difference(_events(socketio.server))
    socketio.known_events -= lost
    return ", ".join(
        f"{name!r}" if namespace == "/" else f"{name!r} of {namespace!r}"
        for namespace, name in sorted(lost)
        if namespace not in socketio.server.namespace_handlers
    )


def _events(server: Any) -> set[tuple[str, str]]:
    return {(namespace, name) for namespace, names in server.handlers.items() for name in names}
