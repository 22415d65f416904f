"""An application with things plugged in: loggers, python-socketio's admin UI.

With ``GUARD=0`` it is not guarded. ``PLUGGED`` says what is plugged in, as JSON: ``instrument`` is
``"before"`` or ``"after"`` the guard, ``admin`` are arguments of ``instrument()``.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

from flask import Flask, request
from flask_socketio import close_room, emit, join_room, leave_room

from tests.faults.app import Application, _log_to_file

PLUGGED_APP = "tests.faults.plugged_app:create_app()"
NAN = float("nan")


def create_app() -> Flask:
    """Return the application."""
    _log_to_file()
    plugged = json.loads(os.environ.get("PLUGGED", "{}"))
    application = _Instrumented(plugged) if plugged.get("instrument") else Application()
    _add_handlers(application)
    return application.app


class _Instrumented(Application):
    """Has the admin UI look at its server."""

    def __init__(self, plugged: dict[str, Any]) -> None:
        self._plugged = plugged
        super().__init__()
        if plugged["instrument"] == "after":
            self._instrument()

    def before_guard(self) -> None:
        """Instrument the server, if it is to be done before it is guarded."""
        if self._plugged["instrument"] == "before":
            self._instrument()

    def _instrument(self) -> None:
        # What it has counted is for /state, and not emptied into statistics.
        options = {"auth": False, "server_stats_interval": 1000, **self._plugged["admin"]}
        self.admin = self.socketio.server.instrument(**options)

    def figures(self) -> dict[str, int]:
        """Return what the admin UI would show, by what it is."""
        counts: Counter[str] = Counter()
        for item in self.admin.event_buffer.buffer.values():
            counts[item["type"]] += item["count"]
        return dict(counts)


def _add_handlers(application: Application) -> None:
    socketio = application.socketio

    @application.app.get("/state")
    def state() -> dict[str, Any]:
        clients = socketio.server.manager.rooms.get("/", {}).get(None, ())
        figures = application.figures() if isinstance(application, _Instrumented) else {}
        return {
            "guard": application.guard is not None,
            "clients": len(clients),
            "figures": figures,
        }

    @application.app.get("/end")
    def end() -> str:
        socketio.emit("end", namespace="/admin")
        return "end"

    @socketio.on("connect")
    def connect() -> None:
        """Take no argument, as most do."""

    @socketio.on("disconnect")
    def disconnect() -> None:
        """Take no argument either."""

    @socketio.on("echo")
    def echo(value: Any) -> Any:
        return value

    @socketio.on("tell")
    def tell(to: Any, where: str) -> None:
        if where == "emit":
            emit("told", 1, to=to)
        elif where == "broadcast":
            emit("told", 2, room=to)
        else:
            socketio.emit("told", 3, to=to)

    @socketio.on("nan")
    def nan(how: str) -> Any:
        if how == "acknowledge":
            return {"deep": [NAN]}
        if how == "callback":
            emit("number", -float("inf"), callback=print)
        else:
            socketio.emit("number", {"deep": [NAN]})
        return "sent"

    @socketio.on("room")
    def room(what: str, name: str) -> None:
        if what == "enter":
            join_room(name)
        elif what == "leave":
            leave_room(name)
        elif what == "close":
            close_room(name)
        else:
            emit("news", {"n": 1, "b": "ä"}, to=name)

    @socketio.on("ask")
    def ask() -> None:
        emit("question", b"bytes", callback=lambda *_answer: None)

    @socketio.on("kick")
    def kick() -> None:
        socketio.server.disconnect(request.sid)  # type: ignore[attr-defined]
