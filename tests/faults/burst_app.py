"""The application of the fault tests, with handlers and tasks that emit much in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Flask, request
from flask_socketio import join_room

from tests.faults.app import create_app as create_base_app

if TYPE_CHECKING:
    from flask_socketio import SocketIO

BURST_APP = "tests.faults.burst_app:create_app()"


def create_app() -> Flask:
    """Return the application, guarded or not, as the environment says."""
    app = create_base_app()
    socketio: SocketIO = app.extensions["socketio"]

    def emit(to: str, count: int, size: int) -> None:
        for number in range(count):
            socketio.emit("burst", (number, "x" * size), to=to)

    @socketio.on("connect", namespace="/greeted")
    def greet(auth: dict[str, int]) -> None:
        sid = request.sid  # type: ignore[attr-defined]
        for number in range(auth["count"]):
            socketio.emit("burst", (number, "x" * auth["size"]), to=sid, namespace="/greeted")

    @socketio.on("join")
    def join(room: str) -> bool:
        join_room(room)
        return True

    @socketio.on("please")
    def please(where: str, count: int, size: int, to: str | None = None) -> Any:
        recipient = to or request.sid  # type: ignore[attr-defined]
        if where == "task":
            socketio.start_background_task(emit, recipient, count, size)
        else:
            emit(recipient, count, size)
        return True

    return app
