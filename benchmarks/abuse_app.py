"""The application under attack; the same code with the guard and without.

Environment variables:
    GUARD, BENCH_REDIS_URL, BENCH_CHANNEL: As in :mod:`benchmarks.app`.
    BENCH_COMPRESSION: ``1`` allows permessage-deflate; needs the guard.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from flask import Flask, request
from flask_socketio import SocketIO, emit

if TYPE_CHECKING:
    from flask_socketio_guard import SocketIOGuard

SLEEP = 30.0  # longer than any attack

logging.basicConfig()  # to stderr, which is a file
app = Flask(__name__)
app.config["SECRET_KEY"] = "not a secret: loopback only"
socketio = SocketIO(
    app,
    async_mode="gevent",
    message_queue=os.environ["BENCH_REDIS_URL"],
    channel=os.environ["BENCH_CHANNEL"],
)
guard: SocketIOGuard | None = None
runs: Counter[str] = Counter()
if os.environ.get("BENCH_COMPRESSION") == "1":
    app.config["SOCKETIO_GUARD_WEBSOCKET_COMPRESSION"] = True
if os.environ.get("GUARD") == "1":
    from flask_socketio_guard import SocketIOGuard

    guard = SocketIOGuard(app, socketio)


@app.get("/")
def index() -> str:
    """Tell the runner that the worker is up."""
    return "up"


@socketio.on("stats")
def stats(_collect: bool) -> dict[str, Any]:
    """Return what the runner needs to know about this process.

    Returns:
        ``{"pid": int, "runtime": "python", "guarded": bool, "limited": False,
        "runs": {handler: times that it has begun}}``
    """
    return {
        "pid": os.getpid(),
        "runtime": "python",
        "guarded": "flask_socketio_guard" in sys.modules,
        "limited": False,
        "runs": runs,
    }


@socketio.on("connect")
def connect() -> None:
    """Accept every client; one with an identity in its query becomes a device of it."""
    runs["connect"] += 1
    identity = request.args.get("identity")
    if guard is not None and identity:
        guard.identify(request.sid, identity)  # type: ignore[attr-defined]


@socketio.on("connect", namespace="/refused")
def refuse() -> bool:
    """Refuse every client."""
    runs["refuse"] += 1
    return False


@socketio.on("echo")
def echo(*args: Any) -> Any:
    """Acknowledge with the data received."""
    runs["echo"] += 1
    return args[0]


@socketio.on("copy")
def copy(argument: Any) -> None:
    """Emit the data received back to its sender."""
    runs["copy"] += 1
    emit("copy", argument)


@socketio.on("probe")
def probe(number: int) -> int:
    """Do the same for the client that measures."""
    return number


@socketio.on("sink")
def sink(*_: Any) -> None:
    """Accept anything, and do nothing."""
    runs["sink"] += 1


@socketio.on("slow")
def slow(_payload: Any) -> None:
    """Keep the data received for as long as the attack lasts."""
    runs["slow"] += 1
    socketio.sleep(SLEEP)


@socketio.on("fail")
def fail() -> None:
    """Raise."""
    runs["fail"] += 1
    raise LookupError("no such thing")


def limited() -> None:
    """Count the events that have passed the rate limit."""
    runs["limited"] += 1


if guard is not None:
    guard.on("limited", rate="5/minute")(limited)
else:
    socketio.on("limited")(limited)


@socketio.on("fill")
def fill(identity: str, count: int, size: int) -> int:
    """Send *count* messages of *size* bytes to *identity*, which is offline; needs the guard."""
    if guard is None:
        return 0
    for number in range(count):
        guard.deliver("news", [number, "x" * size], to=identity)
    return count
