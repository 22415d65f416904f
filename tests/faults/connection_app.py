"""The application whose clients come half, vanish and leave at the wrong moment.

The environment says what it is, as for ``tests.faults.app``. In ``APP_CONFIG`` there may be

``WITHOUT_GEVENT_WEBSOCKET``
    Hides gevent-websocket, so that python-engineio takes simple-websocket, as it does where an
    application runs under gunicorn's plain gevent worker.

What a client's handlers do is in the query of its handshake: ``connect`` and ``disconnect`` name
a behaviour, ``for`` the seconds that ``slow`` ones take. Each accepted connection, each run of a
disconnect handler and each released resource goes to the log as one record.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import flask_socketio
from flask import Response, jsonify, request, send_file
from flask_socketio import Namespace

from tests.faults.app import Application, JsonLines

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask import Flask

EVENTS = "tests.connections"
"""Name of the logger to which goes what happens to connections."""
HIDE = "WITHOUT_GEVENT_WEBSOCKET"
"""The setting that hides gevent-websocket."""

_log = logging.getLogger(EVENTS)


class ConnectionApplication(Application):
    """One process of the application, and what it knows of its connections."""

    def tables(self) -> dict[str, int]:
        """Return how much of connections is remembered in any table."""
        server = self.socketio.server
        leaving = dict(server.manager.pending_disconnect)
        return {
            **super().tables(),
            "rooms": sum(len(rooms) for rooms in dict(server.manager.rooms).values()),
            "sockets": len(server.eio.sockets),
            "disconnecting": sum(len(waiting) for waiting in leaving.values()),
            "attachments": len(server._binary_packet),
            "guarded": 0 if self.guard is None else len(self.guard.connections),
        }

    def state(self) -> dict[str, Any]:
        """Return all that the tests look at."""
        return {**super().state(), "greenlets": self.greenlets()}

    def greenlets(self) -> int:
        """Count the greenlets that have not ended, after collecting what nobody holds."""
        import greenlet

        gc.collect()
        return sum(
            1
            for known in gc.get_objects()
            if isinstance(known, greenlet.greenlet) and not known.dead
        )

    def arrive(self, namespace: str, auth: Any = None) -> bool | None:
        """Do what the client wants a connect handler to do; note that it was accepted."""
        behaviour = request.args.get("connect", "")
        self.runs[f"connect:{namespace}"] += 1
        note("asked", namespace)
        if behaviour.startswith("slow"):
            self.socketio.sleep(float(request.args["for"]))
        if behaviour.endswith("raise"):
            raise RuntimeError("connect failed: secret")
        if behaviour.endswith("refuse"):
            return False
        self.runs[f"accepted:{namespace}"] += 1
        note("accepted", namespace, auth=auth)
        return None

    def depart(self, namespace: str, reason: Any = None) -> None:
        """Note that a disconnect handler runs; do what the client wants it to do."""
        behaviour = request.args.get("disconnect", "")
        self.runs[f"departed:{namespace}"] += 1
        note("departed", namespace, reason=reason)
        if behaviour == "slow":
            self.socketio.sleep(float(request.args["for"]))
            note("farewell done", namespace)
        elif behaviour == "type-error":
            raise TypeError("disconnect failed: secret")
        elif behaviour == "raise" or namespace == "/raising":
            raise RuntimeError("disconnect failed: secret")


class LegacyNamespace(Namespace):
    """A class-based namespace as applications wrote them before the reason was there."""

    application: ConnectionApplication

    def on_connect(self) -> None:
        """Let everyone in."""
        self.application.arrive(self.namespace)

    def on_disconnect(self) -> None:
        """Note it."""
        self.application.depart(self.namespace)


def note(what: str, namespace: str, **facts: Any) -> None:
    """Log what happened to the connection that is being handled."""
    sid = request.sid  # type: ignore[attr-defined]
    note_of(sid, what, namespace=namespace, **facts)


def note_of(sid: str, what: str, **facts: Any) -> None:
    """Log what happened to a connection."""
    _log.info(json.dumps({"what": what, "sid": sid, **facts}, default=str))


def create_app() -> Flask:
    """Return the application, guarded or not, as the environment says."""
    if json.loads(os.environ.get("APP_CONFIG", "{}")).get(HIDE):
        sys.modules["geventwebsocket"] = None  # type: ignore[assignment]
    _log_to_file()
    application = ConnectionApplication()
    for namespace in ("/", "/calm", "/raising"):
        _add_connection_handlers(application, namespace)
    _add_legacy_handlers(application)
    _add_events(application)
    _add_routes(application)
    if application.guard is not None:
        _add_guarded_handlers(application)
        _add_guarded_events(application)
        _add_guarded_routes(application)
    return application.app


def _log_to_file() -> None:
    path = os.environ.get("LOG_RECORDS")
    if path:
        handler = logging.FileHandler(path)
        handler.setFormatter(JsonLines())
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _add_connection_handlers(application: ConnectionApplication, namespace: str) -> None:
    @application.socketio.on("connect", namespace=namespace)
    def connect(auth: Any = None) -> bool | None:
        return application.arrive(namespace, auth)

    @application.socketio.on("disconnect", namespace=namespace)
    def disconnect(reason: Any = None) -> None:
        application.depart(namespace, reason)


def _add_legacy_handlers(application: ConnectionApplication) -> None:
    @application.socketio.on("connect", namespace="/legacy")
    def connect() -> bool | None:
        return application.arrive("/legacy")

    @application.socketio.on("disconnect", namespace="/legacy")
    def disconnect() -> None:
        application.depart("/legacy")

    namespace = LegacyNamespace("/legacy-class")
    namespace.application = application
    application.socketio.on_namespace(namespace)


def _add_events(application: ConnectionApplication) -> None:
    socketio = application.socketio

    @socketio.on("echo")
    def echo(value: Any) -> Any:
        return value

    @socketio.on("enter")
    def enter(room: str) -> str:
        flask_socketio.join_room(room)
        return room

    @socketio.on("leave")
    def leave() -> None:
        """Have the server end the connection."""
        flask_socketio.disconnect()

    @socketio.on("work")
    def work(seconds: float) -> str:
        note("work began", "/")
        socketio.sleep(seconds)
        note("work done", "/")
        return "worked"

    @socketio.on("fill")
    def fill(size: int) -> None:
        """Send the client so much in one message."""
        socketio.emit("filling", "x" * size, to=request.sid)  # type: ignore[attr-defined]


def _add_routes(application: ConnectionApplication) -> None:
    app = application.app

    @app.get("/")
    def index() -> str:
        return "here"

    @app.get("/file")
    def file() -> Response:
        return send_file(__file__)

    @app.get("/state")
    def state() -> Response:
        return jsonify(application.state())

    @app.get("/tables")
    def tables() -> Response:
        return jsonify(application.tables())

    @app.post("/disconnect")
    def disconnect_client() -> Response:
        """Have the server end connections, each in a task of its own."""
        guard, socketio = application.guard, application.socketio
        disconnect = socketio.server.disconnect if guard is None else guard.disconnect
        for sid in request.get_json()["sids"]:
            socketio.start_background_task(disconnect, sid, namespace="/")
        return jsonify(True)


def _add_guarded_handlers(application: ConnectionApplication) -> None:
    guard, socketio = application.guard, application.socketio

    def release(name: str, *, fails: bool = False) -> Callable[[], None]:
        sid = request.sid  # type: ignore[attr-defined]

        def cleanup() -> None:
            note_of(sid, "released", name=name)
            if fails:
                raise RuntimeError("clean-up failed: secret")

        return cleanup

    @socketio.on("connect", namespace="/shaking")
    def connect(_auth: Any = None) -> bool | None:
        if application.arrive("/shaking") is False:
            return False
        connection = guard.connections[request.sid]  # type: ignore[attr-defined]
        connection.defer(release("first"))
        connection.defer(release("second", fails=True))
        connection.defer(release("third"))
        return None

    @socketio.on("disconnect", namespace="/shaking")
    def disconnect(reason: Any) -> None:
        application.depart("/shaking", reason)

    @guard.handshake("hello", timeout=1.0, namespace="/shaking")
    def hello(word: str) -> str:
        if word == "raise":
            raise RuntimeError("handshake failed: secret")
        flask_socketio.join_room("shaken")
        return f"hello, {word}"

    @socketio.on("enter", namespace="/shaking")
    def enter(room: str) -> str:
        flask_socketio.join_room(room)
        return room


def _add_guarded_events(application: ConnectionApplication) -> None:
    guard, socketio = application.guard, application.socketio

    @socketio.on("walk")
    def walk(steps: int) -> None:
        """Send step by step, and look after each whether the client is still there."""
        sid, done = request.sid, 0  # type: ignore[attr-defined]
        try:
            for number in range(steps):
                done = number + 1
                guard.emit("step", number, to=sid)
                guard.checkpoint(sid)
        except Exception as error:
            note_of(sid, "walk ended", error=type(error).__name__, steps=done)
            raise
        note_of(sid, "walk ended", error=None, steps=done)


def _add_guarded_routes(application: ConnectionApplication) -> None:
    app, guard = application.app, application.guard

    @app.get("/connections")
    def connections() -> Response:
        return jsonify(
            [
                {
                    "sid": connection.sid,
                    "namespace": connection.namespace,
                    "state": str(connection.state),
                    "is_open": connection.is_open,
                    "reason": connection.reason,
                }
                for connection in guard.connections.values()
            ]
        )

    @app.post("/connections/count")
    def count() -> Response:
        return jsonify(guard.connections.count(**request.get_json()))

    @app.post("/connections/look")
    def look() -> Response:
        sid = request.get_json()["sid"]
        connection = guard.connections.get(sid)
        try:
            is_known = guard.connections[sid] is not None
        except KeyError:
            is_known = False
        return jsonify(
            {
                "is_connected": guard.is_connected(sid),
                "is_known": is_known,
                "state": None if connection is None else str(connection.state),
            }
        )

    @app.post("/guard/emit")
    def emit() -> Response:
        values = request.get_json()
        count = values.pop("count", 1)
        event, argument = values.pop("event"), "x" * values.pop("size", 1)
        outcomes = []
        for _ in range(count):
            try:
                outcomes.append(str(guard.emit(event, argument, **values).value))
            except Exception as error:
                outcomes.append(type(error).__name__)
        return jsonify(outcomes)

    @app.post("/guard/disconnect")
    def guard_disconnect() -> Response:
        return jsonify(guard.disconnect(**request.get_json()))

    @app.post("/guard/drain")
    def drain() -> Response:
        """Begin to drain, in a task of its own."""

        def run() -> None:
            began_at = time.monotonic()
            is_done = guard.drain()
            note_of("", "drained", is_done=is_done, seconds=time.monotonic() - began_at)

        application.socketio.start_background_task(run)
        return jsonify(True)
