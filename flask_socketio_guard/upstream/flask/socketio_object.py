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
    """Mixed in before ``SocketIO``; every handler is called through it."""

    event_contexts: EventContexts
    known_events: set[tuple[str, str]]
    """(namespace, name) of each event that has had a handler on any server of this object."""
    initialised: Callable[[Any, Any], object] = staticmethod(lambda *_: None)
    """Called with this object and the application after a new server was created."""

    def init_app(self, app: Any, **kwargs: Any) -> None:
        """Initialise this object for another application, or again, like upstream's method.

        Upstream creates a new server, which must be guarded as well, unless an overriding
        ``init_app()`` of the application has already seen to that.
        """
        super().init_app(app, **kwargs)
        if not is_guarded(type(self.server)):
            self.initialised(self, app)

    def on(
        self, message: str, namespace: str | None = None
    ) -> Callable[[Callable[..., object]], Callable[..., object]]:
        """Register an event handler, like upstream's method.

        Raises:
            ConfigError: The handler would never run, such as a coroutine function.
        """
        register = super().on(message, namespace=namespace)

        def decorator(handler: Callable[..., object]) -> Callable[..., object]:
            require_plain(f"the handler of {message!r}", handler)
            registered: Callable[..., object] = register(handler)
            self.known_events.add((namespace or "/", message))
            return registered

        return decorator

    def on_namespace(self, namespace_handler: Any) -> None:
        """Register a class-based namespace, like upstream's method; raises as :meth:`on` does."""
        require_plain_methods(namespace_handler)
        super().on_namespace(namespace_handler)

    def on_error(
        self, namespace: str | None = None
    ) -> Callable[[Callable[..., object]], Callable[..., object]]:
        """Register an error handler, like upstream's method; raises as :meth:`on` does."""
        register = super().on_error(namespace)

        def decorator(handler: Callable[..., object]) -> Callable[..., object]:
            require_plain("the error handler", handler)
            registered: Callable[..., object] = register(handler)
            return registered

        return decorator

    def on_error_default(self, exception_handler: Callable[..., object]) -> Any:
        """Register the default error handler, like upstream; raises as :meth:`on` does."""
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
            # The acknowledgement arrived, but its client has disconnected since and has no
            # request any more. Upstream would silently drop the callback.
            return protected(*args)
        contexts = self.event_contexts
        if environ and contexts.is_fast:
            return contexts.call(protected, message, namespace, sid, args, environ)

        def in_context(*arguments: object) -> object:
            untie_route_error(flask.request)
            return protected(*arguments)

        return super()._handle_event(in_context, message, namespace, sid, *args)

    def emit(self, event: str, *args: object, **kwargs: Any) -> None:
        """Emit an event, like ``SocketIO.emit``, but only ``to=None`` means all clients."""
        callback = kwargs.get("callback")
        if callback is not None:
            # Check it here, before upstream wraps it.
            require_plain("the callback", callback)
        to = kwargs.get("to")
        if not to and (to is not None or not kwargs.get("room", True)):
            kwargs = self._marked(kwargs)
        super().emit(event, *args, **kwargs)

    def call(self, event: str, *args: object, **kwargs: Any) -> Any:
        """Emit to one client and wait for its acknowledgement, like ``SocketIO.call``."""
        return super().call(event, *args, **self._marked(kwargs))

    def _marked(self, options: dict[str, Any]) -> dict[str, Any]:
        changed = marked(options)
        if changed is options or isinstance(self.server, GuardedServer):
            return changed
        return options  # the server belongs to another application, without a guard

    def in_present_request(self, function: Callable[..., object]) -> Callable[..., object]:
        """Wrap *function* to run in a request context of the current event.

        Outside of an event it is returned unchanged, as in upstream's ``emit``.
        """
        sid = getattr(flask.request, "sid", None) if flask.has_request_context() else None
        if sid is None:
            return function
        namespace = flask.request.namespace  # type: ignore[attr-defined]
        return partial(self._handle_event, function, None, namespace, sid)

    def start_background_task(
        self, target: Callable[..., object], *args: object, **kwargs: object
    ) -> Any:
        """Start a background task whose exceptions are recorded.

        The arguments and the result are those of ``SocketIO.start_background_task``.
        """
        server: Any = self.server
        if isinstance(server, GuardedServer):
            target = server.guard.handlers.recording(target)
        return super().start_background_task(target, *args, **kwargs)


def patch_recipients() -> None:
    """Make ``flask_socketio.emit``, ``send`` and ``call`` pass on falsy recipients.

    The originals drop a falsy recipient before any code of the ``SocketIO`` sees it. Applications
    have imported these functions by name, therefore their code objects are replaced.
    """
    if not _originals:
        vars(flask_socketio)["_socketio_guard_call"] = _socketio_guard_call
        for replacement in (emit, send, call):
            name = replacement.__name__
            function = getattr(flask_socketio, name)
            _originals[name] = FunctionType(
                function.__code__, function.__globals__, name, function.__defaults__
            )
            function.__code__ = replacement.__code__


_originals: dict[str, Callable[..., Any]] = {}


def _socketio_guard_call(name: str, first: object, args: Any, options: dict[str, Any]) -> Any:
    # Nothing changes for an application without the guard.
    socketio = flask.current_app.extensions["socketio"]
    if isinstance(socketio.server, GuardedServer):
        options = marked(options)
    return _originals[name](first, *args, **options)


def emit(event: Any, *args: Any, **kwargs: Any) -> Any:
    """Emit an event. This code, like that of `call` and `send`, runs with flask_socketio's globals.

    It therefore must not use names of this module.
    """
    return _socketio_guard_call("emit", event, args, kwargs)


def call(event: Any, *args: Any, **kwargs: Any) -> Any:
    """Emit to one client and wait for its acknowledgement; see :func:`emit`."""
    return _socketio_guard_call("call", event, args, kwargs)


def send(message: Any, **kwargs: Any) -> Any:
    """Send a message; see :func:`emit`."""
    return _socketio_guard_call("send", message, (), kwargs)


def require_plain_methods(namespace: Any) -> None:
    """Check that no handler of a class-based namespace is a kind of function that never runs.

    Raises:
        ConfigError: A handler would never run.
    """
    for name in dir(type(namespace)):
        if name.startswith("on_") or name == "error":
            require_plain(f"{type(namespace).__name__}.{name}", getattr(namespace, name))


def require_plain_handlers(socketio: Any) -> None:
    """Check the handlers that were registered before the guard was installed.

    Raises:
        ConfigError: A handler would never run.
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
    """Return whether *value* is a ``SocketIO``; spares other modules the import."""
    return isinstance(value, flask_socketio.SocketIO)


def note_handlers(socketio: Any) -> None:
    """Record the events that the server of *socketio* handles; see :func:`take_lost_handlers`."""
    known: set[tuple[str, str]] = vars(socketio).setdefault("known_events", set())
    known.update(_events(socketio.server))


def take_lost_handlers(socketio: Any) -> str:
    """Return, once, the events that lost their handlers when *socketio* got its current server.

    ``SocketIO.on`` registers a handler only with the current server, if there is one. A handler
    that was registered after one ``init_app`` is missing from the server of the next.

    Returns:
        The names for a log line, separated by commas, or ``""``.
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
