"""The request context of an event, whose constant parts are computed once per connection.

Flask-SocketIO creates a context for each event as for an HTTP request: it binds and matches the
URL and reads the session from the cookie, each time with the same result. That is half the cost
of a small event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import flask
import flask.ctx
from flask import Flask
from flask_socketio import SocketIO, _ManagedSession
from socketio.exceptions import ConnectionRefusedError as ConnectionRefused
from werkzeug.datastructures import EnvironHeaders

from ...telemetry.records import logger
from ..overrides import overrides

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIEnvironment
    from flask.ctx import RequestContext
else:
    # Flask 3.2 has merged it into AppContext and warns about the old name.
    RequestContext = vars(flask.ctx).get("RequestContext") or flask.ctx.AppContext

_HAS_REQUEST_CONTEXTS: Final = "RequestContext" in vars(flask.ctx)
_ROUTE: Final = "socketio_guard.route"
_REQUEST: Final = "werkzeug.request"
_SESSION: Final = "saved_session"  # Flask-SocketIO's key in the environ
_KNOWN: Final = frozenset(
    {
        "_after_request_functions",
        "_cv_tokens",
        "_session",
        "app",
        "flashes",
        "request",
        "session",
        "url_adapter",
    }
)
"""The attributes of a request context in Flask 3.0 and 3.1."""
_SESSION_ATTRIBUTE: Final = (
    "_session" if isinstance(vars(RequestContext).get("session"), property) else "session"
)


class _Route:
    """The parts of a request context that depend only on a connection's URL and headers.

    Args:
        context: The context of the connection's first event, pushed.
    """

    __slots__ = ("_class", "_fields", "_is_plain", "_view_args", "adapter")

    def __init__(self, context: RequestContext) -> None:
        first = context.request
        self.adapter = context.url_adapter
        self._class = type(first)
        self._view_args = dict(first.view_args) if first.view_args is not None else None
        self._fields = {
            "json_module": first.json_module,
            "routing_exception": first.routing_exception,
            "url_rule": first.url_rule,
        }
        self._is_plain = self._class.__init__ is flask.Request.__init__
        if self._is_plain:
            names = _names_of(first)
            for name, value in vars(first).items():
                if name in names:
                    self._fields[name] = value

    def request(self, environ: WSGIEnvironment) -> flask.Request:
        """Return a new request for the connection, without matching its URL again."""
        if self._is_plain:
            request: flask.Request = self._class.__new__(self._class)
            request.environ = environ
            request.headers = EnvironHeaders(environ)
            environ[_REQUEST] = request
        else:
            request = self._class(environ)
        vars(request).update(self._fields)
        if self._view_args is not None:
            request.view_args = self._view_args.copy()
        return request


_known_names: WeakKeyDictionary[type[flask.Request], frozenset[str]] = WeakKeyDictionary()


def _names_of(request: flask.Request) -> frozenset[str]:
    """Return the attributes that a fresh request has, before any are computed on demand.

    Without the environ: it will hold the kept attributes, and a reference back to it would be a
    cycle for the garbage collector.
    """
    request_class = type(request)
    names = _known_names.get(request_class)
    if names is None:
        unused = request_class(request.environ)
        request.environ[_REQUEST] = request
        names = _known_names[request_class] = frozenset(vars(unused)) - {"environ", "headers"}
    return names


def _event_context(
    app: Flask, environ: WSGIEnvironment, route: _Route, session: Any
) -> RequestContext:
    """Return a request context with its own request and the connection's route and session.

    It is an instance of Flask's own class, not a subclass, because Flask and extensions create
    similar contexts by calling its class, as ``RequestContext.copy`` does.

    Args:
        app: The application.
        environ: WSGI environ of the connection.
        route: The kept route of the connection.
        session: The session of the connection; ``None`` to let Flask open it.
    """
    context = RequestContext.__new__(RequestContext)
    # Flask's constructor is not called: it would bind the URL again.
    context.app = app
    context.request = route.request(environ)
    context.url_adapter = route.adapter
    context.flashes = None
    context._after_request_functions = []
    context._cv_tokens = []
    context.match_request = _do_nothing  # type: ignore[method-assign]  # the route is known
    setattr(context, _SESSION_ATTRIBUTE, session)
    return context


def _do_nothing() -> None:
    pass


class EventContexts:
    """Calls the handlers of one ``SocketIO`` in request contexts.

    Args:
        socketio: A guarded ``SocketIO``.
        is_fast: Whether to reuse the constant parts of contexts, that is, the setting ``FAST``.
    """

    def __init__(self, socketio: SocketIO, *, is_fast: bool) -> None:
        self._socketio = socketio
        self._is_fast = is_fast
        if overrides(type(socketio), "_handle_event"):
            self._give_up("SocketIO._handle_event is overridden")
        if not _HAS_REQUEST_CONTEXTS:
            self._give_up("this version of Flask implements them differently")

    @property
    def is_fast(self) -> bool:
        """Whether :meth:`call` may be used instead of ``SocketIO._handle_event``."""
        return self._is_fast

    def call(
        self,
        handler: Callable[..., object],
        message: str | None,
        namespace: str,
        sid: str,
        args: tuple[Any, ...],
        environ: WSGIEnvironment,
    ) -> object:
        """Do what ``SocketIO._handle_event`` does, and return the result of *handler*.

        Args:
            handler: The handler. For a connect event it must accept any arguments.
            message: Name of the event, or ``None`` for a callback.
            namespace: Socket.IO namespace.
            sid: Session id of the client.
            args: Arguments of the handler, without the session id.
            environ: WSGI environ of the connection.
        """
        socketio = self._socketio
        app = environ["flask.app"]
        is_managed = socketio.manage_session
        session = environ.get(_SESSION) if is_managed else None
        route = environ.get(_ROUTE)
        context = (
            app.request_context(environ)
            if route is None
            else _event_context(app, environ, route, session)
        )
        with context:
            if route is None:
                untie_route_error(context.request)
                self._learn(app, environ, context)
            if not is_managed:
                session = flask.session._get_current_object()  # type: ignore[attr-defined]
            elif route is None:
                if session is None:
                    session = environ[_SESSION] = _ManagedSession(flask.session)
                setattr(context, _SESSION_ATTRIBUTE, session)
            request: Any = context.request
            request.sid = sid
            request.namespace = namespace
            request.event = {"message": message, "args": args}
            try:
                if message == "connect":
                    result = handler(args[1] if len(args) > 1 else None)
                else:
                    result = handler(*args)
            except ConnectionRefused:
                raise
            except Exception as exc:
                on_error = socketio.exception_handlers.get(
                    namespace, socketio.default_exception_handler
                )
                if on_error is None:
                    raise
                return on_error(exc)
            if not is_managed and getattr(session, "modified", True):
                app.session_interface.save_session(app, session, app.response_class())
            return result

    def _learn(self, app: Flask, environ: WSGIEnvironment, context: RequestContext) -> None:
        if not self._is_fast:
            return
        is_known = (
            type(context) is RequestContext
            and vars(context).keys() <= _KNOWN
            and "request_context" not in vars(app)
            and type(app).request_context is Flask.request_context
        )
        if is_known:
            environ[_ROUTE] = _Route(context)
        else:
            self._give_up("the application creates request contexts of its own")

    def _give_up(self, why: str) -> None:
        if self._is_fast:
            self._is_fast = False
            logger.info("events use Flask-SocketIO's own request contexts: %s", why)


def untie_route_error(request: flask.Request) -> None:
    """Drop the traceback of the routing error, which would keep the request alive.

    No route matches the Socket.IO path, and Flask stores the error in the request. Its traceback
    refers to every frame of the event and back to the request: a cycle of some sixty objects for
    each event, with its payload, that only the garbage collector can free. That takes a twentieth
    of the event's time.
    """
    error = request.routing_exception
    if error is not None:
        error.__traceback__ = error.__context__ = None
