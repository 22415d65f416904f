"""The application of the soak: numbered streams to everyone, to rooms and to single clients.

The environment says what it is, as for ``tests.faults.app``.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import flask_socketio
from flask import Response, jsonify, request

from tests.faults.app import JsonLines
from tests.faults.connection_app import ConnectionApplication

if TYPE_CHECKING:
    from flask import Flask

SOAK_APP = "tests.soak.app:create_app()"
ROOMS = 25
EVERYONE, BINARY_ROOM, LARGE_ROOM = "everyone", "binary", "large"
LARGE_SIZE = 50_000

_TURN = 0.5
"""Seconds between two events of a room."""


class SoakApplication(ConnectionApplication):
    """One process, and the numbers of what it has emitted."""

    def __init__(self) -> None:
        super().__init__()
        self.name = os.environ["SOAK_PROCESS"]
        self.is_emitting = False
        self.is_done = True
        self.numbers: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()

    def emit_streams(self) -> None:
        """Emit to each room in turn until told to stop."""
        rooms = [f"room-{number}" for number in range(ROOMS)]
        turn = 0
        while self.is_emitting:
            began_at = time.monotonic()
            for index, room in enumerate(rooms):
                self._emit(room, "x" * 50)
                delay = began_at + _TURN * (index + 1) / len(rooms) - time.monotonic()
                self.socketio.sleep(max(delay, 0))
            turn += 1
            if turn % 2:
                self._emit(EVERYONE, {"text": "ä" * 50})
                self._emit(BINARY_ROOM, [os.urandom(200), {"more": os.urandom(20)}])
                self._emit(LARGE_ROOM, "y" * LARGE_SIZE)
                self._ask()
        self.is_done = True

    def _emit(self, room: str, payload: Any) -> None:
        self.numbers[room] += 1
        event = (f"{self.name}:{room}", self.numbers[room], payload)
        to = None if room == EVERYONE else room
        self.socketio.emit("stream", event, to=to)

    def _ask(self) -> None:
        for sid in list(self.asked):
            number = self.asked[sid] + 1
            self.asked[sid] = number

            def take(answer: int, *, sid: str = sid, number: int = number) -> None:
                assert answer == number
                self.answered[sid] += 1

            self.socketio.emit("question", number, to=sid, callback=take)


def create_app() -> Flask:
    """Return the application."""
    handler = logging.FileHandler(os.environ["LOG_RECORDS"])
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    application = SoakApplication()
    _add_events(application)
    _add_routes(application)
    return application.app


def _add_events(application: SoakApplication) -> None:
    socketio = application.socketio

    @socketio.on("connect")
    def connect(_auth: Any = None) -> None:
        application.runs["connect"] += 1

    @socketio.on("disconnect")
    def disconnect(_reason: Any) -> None:
        application.runs["disconnect"] += 1

    @socketio.on("echo")
    def echo(value: Any) -> Any:
        return value

    @socketio.on("enter")
    def enter(rooms: list[str]) -> dict[str, int]:
        """Let a client into rooms; return the number of the last event of each before that."""
        before = {}
        for room in rooms:
            flask_socketio.join_room(room)
            before[f"{application.name}:{room}"] = application.numbers[room]
        return before

    @socketio.on("be asked")
    def be_asked() -> None:
        application.asked[request.sid] += 0  # type: ignore[attr-defined]

    @socketio.on("tell")
    def tell(sid: str, stream: str, number: int) -> int:
        """Pass something on to one client, here or in the other process."""
        socketio.emit("stream", (stream, number, None), to=sid)
        return number


def _add_routes(application: SoakApplication) -> None:
    app = application.app

    @app.get("/")
    def index() -> str:
        return "here"

    @app.post("/streams/start")
    def start() -> Response:
        application.is_emitting, application.is_done = True, False
        application.socketio.start_background_task(application.emit_streams)
        return jsonify(True)

    @app.post("/streams/stop")
    def stop() -> Response:
        """Stop emitting; return the number of the last event of each stream."""
        application.is_emitting = False
        while not application.is_done:
            application.socketio.sleep(0.01)
        return jsonify(
            {f"{application.name}:{room}": last for room, last in application.numbers.items()}
        )

    @app.get("/answers")
    def answers() -> Response:
        return jsonify(
            {
                "asked": application.asked.total(),
                "answered": application.answered.total(),
            }
        )

    @app.get("/tables")
    def tables() -> Response:
        return jsonify(application.tables())

    @app.get("/inside")
    def inside() -> Response:
        """Return what must not grow, and what must not have happened."""
        counters = {} if application.guard is None else dict(application.guard.counters)
        return jsonify({"greenlets": application.greenlets(), "counters": counters})
