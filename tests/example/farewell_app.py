"""An application that is busy when it is asked to stop: with a task, and with a request."""

from __future__ import annotations

import os
import time

from flask import Flask
from flask_socketio import SocketIO

from flask_socketio_guard import SocketIOGuard

FAREWELL = "farewell"
SLOW = "a slow request has come"
SLOW_DURATION = 2.5


def create_app() -> Flask:
    """Create the application; ``REDIS_URL`` names the message queue."""
    app = Flask(__name__)
    app.config.from_prefixed_env()
    socketio = SocketIO(app, message_queue=os.environ["REDIS_URL"])
    guard = SocketIOGuard(app, socketio)

    @app.get("/slow")
    def slow() -> str:
        app.logger.warning(SLOW)
        time.sleep(SLOW_DURATION)
        return "done"

    @guard.task
    def work() -> None:
        while guard.sleep(3600.0):
            pass
        guard.emit(FAREWELL, {"pid": os.getpid()})

    return app
