"""The application under test, which forks children while it serves."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import TYPE_CHECKING, Any

from flask import jsonify, request

from tests.faults.app import create_app as create

if TYPE_CHECKING:
    from flask import Flask, Response

FORKING_APP = "tests.faults.forking_app:create_app()"


def create_app() -> Flask:
    """Return the application with one more route."""
    app = create()
    socketio: Any = app.extensions["socketio"]

    guard: Any = app.extensions.get("socketio_guard")
    if guard is not None:

        @guard.task(every=0.05, name="ticker")
        def tick() -> None:
            """Tell who runs it, which must not be a child."""
            socketio.emit("tick", os.getpid())

    def work(count: int, seconds: float, ppid: int) -> None:
        # gunicorn's loop is in the child, too, and would end it when it sees another parent.
        os.getppid = lambda: ppid
        for number in range(count):
            socketio.emit("child", number)
        time.sleep(seconds)  # what the child has of its parent gets its chance
        if guard is not None:
            guard.flush(5)
            guard.emit("tables", _tables(socketio))

    @app.post("/fork")
    def fork() -> Response:
        values = request.get_json()
        for number in range(values["count"]):
            socketio.emit("parent", number)
        # In the same turn of the event loop: nothing of that has been written yet.
        child = multiprocessing.get_context("fork").Process(
            target=work, args=(values["count"], values["seconds"], os.getppid())
        )
        child.start()
        child.join()
        return jsonify(True)

    return app


def _tables(socketio: Any) -> dict[str, int]:
    server = socketio.server
    return {
        "sockets": len(server.eio.sockets),
        "rooms": len(server.manager.rooms),
        "environ": len(server.environ),
    }
