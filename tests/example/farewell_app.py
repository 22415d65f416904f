"""An application whose task has something to say when it is asked to stop."""

from __future__ import annotations

import os

from flask import Flask
from flask_socketio import SocketIO

from flask_socketio_guard import SocketIOGuard

FAREWELL = "farewell"


def create_app() -> Flask:
    """Create the application; ``REDIS_URL`` names the message queue."""
    app = Flask(__name__)
    app.config.from_prefixed_env()
    socketio = SocketIO(app, message_queue=os.environ["REDIS_URL"])
    guard = SocketIOGuard(app, socketio)

    @guard.task
    def work() -> None:
        while guard.sleep(3600.0):
            pass
        guard.emit(FAREWELL, {"pid": os.getpid()})

    return app
