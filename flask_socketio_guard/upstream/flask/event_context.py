"""The request context of an event: what a connection does not change is worked out once.

Stock makes the context of each event as if it were one of HTTP: the URL is bound and
matched, and the session read from the cookie, each time with the same result. That is
half of what a small event costs.
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
    # Flask 3.2 has merged it into AppContext and warns of the name.
    RequestContext = vars(flask.ctx).get("RequestContext") or flask.ctx.AppContext

_HAS_REQUEST_CONTEXTS: Final = "RequestContext" in vars(flask.ctx)
_ROUTE: Final = "socketio_guard.route"
_REQUEST: Final = "werkzeug.request"
_SESSION: Final = "saved_session"  # Flask-SocketIO's name for it
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
"""What a request context of Flask 3.0 and 3.1 consists of."""
_SESSION_ATTRIBUTE: Final = (
    "_session" if isinstance(vars(RequestContext).get("session"), property) else "session"
)


class _Route:
    """What the URL and the headers of a connection lead to, as its first event found it.

    Args:
        context: Of that event, pushed.
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
        """Return a new request of the same connection."""
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
    """Return the attributes of a request that nobody has used: nothing worked out on demand.

    The environ is not among them: it will hold what is kept, and held by that it would be left
    to the garbage collector.
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
    """Return a request context with a request of its own, and all else of its connection.

    It is Flask's own kind, filled by hand, since Flask and extensions make contexts like it
    by calling its class: ``RequestContext.copy`` does.

    Args:
        app: The application.
        environ: WSGI environ of the connection.
        route: Of the connection.
        session: Of the connection; ``None`` to have Flask open it.
    """
    context = RequestContext.__new__(RequestContext)
    # Not Flask's constructor, which binds the URL anew.
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
    """Calls handlers of one ``SocketIO`` in request contexts.

    Args:
        socketio: Guarded.
        is_fast: Whether what does not change is kept.
    """

    def __init__(self, socketio: SocketIO, *, is_fast: bool) -> None:
        self._socketio = socketio
        self._is_fast = is_fast
        if overrides(type(socketio), "_handle_event"):
            self._give_up("SocketIO._handle_event is overridden")
        if not _HAS_REQUEST_CONTEXTS:
            self._give_up("those of this version of Flask are of another kind")

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
        """Do what ``SocketIO._handle_event`` does; takes and returns the same.

        Args:
            handler: Fits the arguments of connect handlers itself.
            message: Name of the event; ``None`` for a callback.
            namespace: Socket.IO namespace.
            sid: Session id of the client.
            args: Of the handler, after the session id.
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
            self._give_up("the application makes request contexts of its own")

    def _give_up(self, why: str) -> None:
        if self._is_fast:
            self._is_fast = False
            logger.info("events have request contexts as without the guard: %s", why)


def untie_route_error(request: flask.Request) -> None:
    """Drop the traceback of the route that was not found.

    No route leads to the Socket.IO path, and Flask keeps the error on the
    request. Its traceback leads through every frame of the event back to the
    request: a cycle of some sixty objects for each event, payload included, that
    only the garbage collector can free, at a twentieth of the event's time.
    """
    error = request.routing_exception
    if error is not None:
        error.__traceback__ = error.__context__ = None
