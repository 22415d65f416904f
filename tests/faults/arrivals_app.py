"""The application of the fault tests, with what clients send at the edges of a connection.

That is while their connect handler runs, right before they leave, and more at once than is handled.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, has_request_context, jsonify, request, session
from flask_socketio import disconnect, emit, join_room, rooms, send
from socketio.exceptions import TimeoutError as CallTimeout

from tests.faults.app import create_app as create_base_app

if TYPE_CHECKING:
    from flask_socketio import SocketIO

ARRIVALS_APP = "tests.faults.arrivals_app:create_app()"
GATE = "/gate"
"""The namespace whose connect handler does what its client wants."""


def create_app() -> Flask:
    """Return the application, guarded or not, as the environment says."""
    app = create_base_app()
    socketio: SocketIO = app.extensions["socketio"]
    notes: list[Any] = []
    lock = threading.Lock()

    def note(*facts: Any) -> None:
        with lock:
            notes.append(list(facts))

    _add_events(socketio, note)
    _add_gate(socketio, note)

    @app.get("/notes")
    def get_notes() -> Response:
        with lock:
            found = list(notes)
            if request.args.get("reset"):
                notes.clear()
        return jsonify(found)

    @app.get("/held")
    def held() -> Response:
        return jsonify(len(getattr(socketio.server.manager, "_held", ())))

    @app.get("/ping")
    def ping() -> str:
        return "pong"

    @app.post("/greet")
    def greet() -> Response:
        socketio.emit("news", "to all", namespace=GATE)
        socketio.emit("news", "to the room", to="lobby", namespace=GATE)
        return jsonify(True)

    return app


def _sid() -> str:
    return request.sid  # type: ignore[attr-defined,no-any-return]


def _add_events(socketio: SocketIO, note: Any) -> None:
    @socketio.on("disconnect")
    def left(_reason: Any = None) -> None:
        note("left", _sid(), request.args.get("name"))

    @socketio.on("last")
    def last(number: Any, seconds: float = 0.0) -> Any:
        session["last"] = number
        note("last", _sid(), number, request.args.get("name"), _sid() in rooms())
        socketio.sleep(seconds)
        note("done", _sid(), number)
        return number

    @socketio.on("ask")
    def ask() -> None:
        """Emit with a callback."""

        def answered(*values: Any) -> None:
            note("answered", _sid() if has_request_context() else None, *values)

        emit("question", callback=answered)

    @socketio.on("kick")
    def kick() -> None:
        socketio.sleep(0.2)  # what comes behind it has been read then
        disconnect()
        note("kicked", _sid())

    @socketio.on("call")
    def call(number: int, timeout: float = 20.0) -> Any:
        """Ask the client that is waiting for an answer itself."""
        return socketio.call("question", number, to=_sid(), timeout=timeout)


def _add_gate(socketio: SocketIO, note: Any) -> None:
    @socketio.on("connect", namespace=GATE)
    def enter(_auth: Any = None) -> bool | None:
        wants = request.args.get("gate", "").split(",")
        join_room("lobby")
        note("enter", _sid())
        emit("secret", 1)
        emit("secret", 2, to="lobby")
        send("secret 3")
        if "ask" in wants:
            emit("question", callback=lambda *values: note("answered", *values))
        if "call" in wants:
            began_at = time.monotonic()
            try:
                answer = socketio.call("question", to=_sid(), namespace=GATE, timeout=10)
            except CallTimeout as error:
                answer = type(error).__name__
            note("called", answer, time.monotonic() - began_at)
        if "slow" in wants:
            socketio.sleep(float(request.args["for"]))
        note("entered", _sid())
        return False if "refuse" in wants else None

    @socketio.on("disconnect", namespace=GATE)
    def leave(_reason: Any = None) -> None:
        note("left", _sid())

    @socketio.on("early", namespace=GATE)
    def early(number: int) -> int:
        note("early", number, _sid() in rooms())
        return number
