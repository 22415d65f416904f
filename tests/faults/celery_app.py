"""A Celery worker of a fleet: no Flask application, but answers and acknowledged delivery."""

from __future__ import annotations

import os
import threading
from typing import Any

from celery import Celery
from flask_socketio import SocketIO

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.errors import ConnectionClosed

_URL = os.environ["REDIS_URL"]

celery = Celery("tests.faults.celery_app", broker=_URL, backend=_URL)
celery.conf.broker_connection_retry_on_startup = True
# Made in the parent; each child of the pool begins anew.
socketio = SocketIO(message_queue=_URL)
guard = SocketIOGuard(socketio=socketio)


@celery.task(name="deliver")  # type: ignore[untyped-decorator]
def deliver(to: str, value: Any, seconds: float) -> list[str]:
    """Deliver a message, and wait."""
    receipt = guard.deliver("news", value, to=to)
    return [receipt.id, str(receipt.wait(seconds))]


@celery.task(name="ask")  # type: ignore[untyped-decorator]
def ask(sid: str, seconds: float) -> Any:
    """Ask a client."""
    try:
        return guard.call("question", "from Celery", to=sid, timeout=seconds)
    except ConnectionClosed:
        return "gone"


@celery.task(name="ask_with_callback")  # type: ignore[untyped-decorator]
def ask_with_callback(sid: str, seconds: float) -> Any:
    """Ask a client, and have the answer brought by a callback."""
    answers: list[Any] = []
    heard = threading.Event()

    def answered(*args: Any) -> None:
        answers.extend(args)
        heard.set()

    guard.emit("question", "again", to=sid, callback=answered)
    heard.wait(seconds)
    return answers


@celery.task(name="ask_all")  # type: ignore[untyped-decorator]
def ask_all(room: str, seconds: float) -> Any:
    """Ask everybody in a room."""
    answers = guard.broadcast_call("question", "all", room=room, timeout=seconds)
    return [sorted(answers.answers.values()), len(answers.missing), answers.silent_processes]
