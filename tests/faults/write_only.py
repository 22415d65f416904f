"""A process that only emits, as a Celery worker does: no Flask application, no listener.

It reads one JSON object per line and answers each with one line of JSON:

``{"do": "emit", "event": str, "count": int}``
    Emit numbered events.
``{"do": "emit-unserialisable"}``
    Emit what JSON cannot hold.
``{"do": "flush", "timeout": float}``
    Wait until everything is sent. Only with the guard.

At the end of its input it ends as any Python program does.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from typing import Any

from flask_socketio import SocketIO


def main() -> None:
    """Obey the commands on standard input."""
    socketio = SocketIO(message_queue=os.environ["REDIS_URL"])
    guard: Any = None
    if os.environ.get("GUARD") == "1":
        from flask_socketio_guard import SocketIOGuard

        guard = SocketIOGuard(socketio=socketio, **_settings())
    numbers = itertools.count()
    for line in sys.stdin:
        command = json.loads(line)
        answer = _obey(command, socketio, guard, numbers)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _settings() -> dict[str, Any]:
    """Return the guard's settings among those of the application."""
    config = json.loads(os.environ.get("APP_CONFIG", "{}"))
    prefix = "SOCKETIO_GUARD_"
    return {
        name.removeprefix(prefix).lower(): value
        for name, value in config.items()
        if name.startswith(prefix)
    }


def _obey(command: dict[str, Any], socketio: SocketIO, guard: Any, numbers: Any) -> Any:
    if command["do"] == "emit":
        for _ in range(command["count"]):
            socketio.emit(command["event"], {"number": next(numbers)})
        return "emitted"
    if command["do"] == "emit-unserialisable":
        try:
            socketio.emit("unserialisable", {"tags": {"a", "set"}})
        except TypeError as error:
            return {"error": "TypeError", "text": str(error)}
        return {"error": None}
    if guard is None:
        return "nothing to flush"
    return guard.flush(command["timeout"])


if __name__ == "__main__":
    main()
