"""The application that leaves a mark wherever Python lets it, and looks for those of others.

The environment says what it is, as for ``tests.faults.app``. Whoever is handled looks everywhere
for a mark, notes what was left there, and leaves its own. ``/found`` tells what was seen.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import flask
from flask import g, jsonify, request, session
from flask_babel import Babel, force_locale, get_locale

from tests.faults.app import Application, _log_to_file

if TYPE_CHECKING:
    from flask import Flask, Response

_variable: ContextVar[str | None] = ContextVar("mark", default=None)
_local = threading.local()
_by_ident: dict[int, str] = {}
_by_thread: dict[threading.Thread, str] = {}
_LOCALES = ("de", "fr", "pl", "tr")


class Marks:
    """Looks for marks, leaves marks, and remembers what was found.

    Args:
        has_greenlets: Whether what runs has a greenlet of its own; the operating system gives
            the ident of a thread that has ended to the next one.
    """

    def __init__(self, *, has_greenlets: bool) -> None:
        self._has_greenlets = has_greenlets
        self.found: list[str] = []
        self.visits: list[str] = []
        self._locales: list[Any] = []

    def visit(self, what: str, who: str) -> None:
        """Look and leave marks on behalf of the client *who*."""
        mark = f"{what} of {who}"
        self.visits.append(mark)
        places = self._swap(mark)
        if what == "a task":
            # gevent's spawn() hands the first on, and gives the second, an address, out again.
            places.pop("the tree of greenlets", None)
            places.pop("what an ident leads to", None)
        for place, left in places.items():
            if left is not None:
                self.found.append(f"{mark} has seen in {place}: {left}")
        if flask.has_request_context():
            # These belong to the connection.
            for place, kept in (("the session", session), ("the environ", request.environ)):
                left = kept.get("mark")
                if left not in (None, who):
                    self.found.append(f"{mark} has seen in {place}: {left}")
                kept["mark"] = who

    def _swap(self, mark: str) -> dict[str, Any]:
        left: dict[str, Any] = {
            "a context variable": _variable.get(),
            "a threading.local": getattr(_local, "mark", None),
        }
        _variable.set(mark)
        _local.mark = mark
        if self._has_greenlets:
            import gevent

            me: Any = gevent.getcurrent()
            ident, thread = threading.get_ident(), threading.current_thread()
            left["the greenlet"] = getattr(me, "mark", None)
            left["the thread"] = getattr(thread, "mark", None)
            left["what an ident leads to"] = _by_ident.get(ident)
            left["what a thread leads to"] = _by_thread.get(thread)
            left["the tree of greenlets"] = me.spawn_tree_locals.get("mark")
            me.mark = thread.mark = me.spawn_tree_locals["mark"] = mark  # type: ignore[attr-defined]
            _by_ident[ident] = _by_thread[thread] = mark
        if flask.has_request_context():
            left["Flask-Babel's locale"] = self._swap_locale()
            left["g"] = g.get("mark")
            left["the request"] = vars(request._get_current_object()).get("mark")  # type: ignore[attr-defined]
            g.mark = request.mark = mark  # type: ignore[attr-defined]
        return left

    def _swap_locale(self) -> str | None:
        """Force a locale, and never let go; return what somebody else has forced."""
        left = str(get_locale())
        forced = force_locale(_LOCALES[len(self._locales) % len(_LOCALES)])
        forced.__enter__()
        self._locales.append(forced)  # without it the block would end
        return None if left == "en" else left


def create_app() -> Flask:
    """Return the application, guarded or not, as the environment says."""
    _log_to_file()
    application = Application()
    application.app.secret_key = "secret"
    app, socketio = application.app, application.socketio
    Babel(app, default_locale="en")
    marks = Marks(has_greenlets=application.async_mode == "gevent")

    def who() -> str:
        return str(request.args.get("who"))

    @socketio.on("connect")
    @socketio.on("connect", namespace="/other")
    def connect(_auth: Any = None) -> None:
        name = who()
        marks.visit("connect", name)
        if application.guard is not None:
            connection = application.guard.connections[request.sid]  # type: ignore[attr-defined]
            connection.defer(lambda: marks.visit("a cleanup", name))

    @socketio.on("disconnect")
    @socketio.on("disconnect", namespace="/other")
    def disconnect(_reason: Any = None) -> None:
        marks.visit("disconnect", who())

    @socketio.on("mark")
    def mark(number: int) -> int:
        marks.visit("an event", who())
        if number % 3 == 0:
            socketio.sleep(0.001)  # a greenlet that has waited is in no way another one
        return number

    @socketio.on("ask")
    def ask() -> None:
        name = who()
        flask.copy_current_request_context(lambda: None)()
        socketio.emit("asked", to=request.sid, callback=lambda: marks.visit("a callback", who()))  # type: ignore[attr-defined]
        socketio.start_background_task(lambda: marks.visit("a task", name))
        marks.visit("an event", name)

    @socketio.on("fail")
    def fail() -> None:
        raise LookupError("as it must")

    @socketio.on_error_default
    def failed(_error: Exception) -> str:
        marks.visit("an error handler", who())
        return "failed"

    @socketio.on("kick")
    def kick(sid: str) -> None:
        socketio.server.disconnect(sid)
        marks.visit("an event", who())

    @app.get("/mark")
    def page() -> Response:
        if not _variable.get():
            marks._swap("an HTTP request")
        return jsonify(True)

    @app.get("/found")
    def found() -> Response:
        return jsonify({"found": marks.found, "visits": marks.visits})

    @app.get("/")
    def index() -> str:
        return "here"

    @app.get("/state")
    def state() -> Response:
        return jsonify(application.state())

    return app
