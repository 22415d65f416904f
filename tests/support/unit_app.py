"""A small application for tests that need a real server under gevent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flask import Flask, jsonify
from flask_socketio import SocketIO

from flask_socketio_guard import SocketIOGuard

_NEVER = 3600.0

socketio = SocketIO()
guard = SocketIOGuard(health_details="unit")
steps: list[str] = []


@guard.on("slow", timeout=0.2)
def slow(behaviour: str) -> str:
    """Take too long: in a wait, or in spite of being interrupted."""
    steps.append("began")
    try:
        socketio.sleep(_NEVER)
    except BaseException:
        steps.append("interrupted")
        if behaviour == "answer all the same":
            return "an answer"
        raise
    return "never"


@guard.on("quick", timeout=5.0)
def quick() -> str:
    """Answer in time."""
    return "in time"


@guard.task(every=0.05, name="ticker")
def tick() -> None:
    """Count the runs."""
    steps.append("tick")


@guard.task(name="steady", restart="always")
def steady() -> None:
    """Note that the process has started its tasks, and that it stops."""
    _note("started")
    if not guard.sleep(_NEVER):
        _note("stopped")


def _note(what: str) -> None:
    path = os.environ.get("LIFE_FILE")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {what}\n")


def create_app() -> Flask:
    """Return the application."""
    app = Flask(__name__)
    app.config.from_prefixed_env()
    socketio.init_app(
        app,
        async_mode=os.environ.get("ASYNC_MODE", "gevent"),
        message_queue=os.environ.get("REDIS_URL"),
    )
    guard.init_app(app, socketio)

    @app.get("/state")
    def state() -> Any:
        return jsonify(
            pid=os.getpid(),
            steps=steps,
            counters=guard.counters,
            listener=str(guard.listener_state),
            host_id=getattr(socketio.server.manager, "host_id", None),
        )

    return app
