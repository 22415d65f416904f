"""A process whose last act is to emit, and whose end nobody hears of.

``python -m tests.faults.last_emits HOW`` emits :data:`EVENTS` numbered events, guarded with
``GUARD=1``, from an application that serves nobody with ``FORM=app``:

``exit``
    in the process itself, which calls ``os._exit`` then;
``fork``, ``spawn``
    in a child of multiprocessing;
``late``
    in a child of multiprocessing, which prints how long that took;
``os-fork``
    in a child of ``os.fork``, which calls ``os._exit`` then;
``at-exit``
    in a function that runs at exit, and after the guard's, of a process that serves.

:func:`work` does the same as a job of RQ, whose work horses are forked and end by ``os._exit``.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import time
from typing import Any

from flask import Flask
from flask_socketio import SocketIO

EVENTS = 5


def _make() -> Any:
    url = os.environ["REDIS_URL"]
    app: Flask | None = None
    if os.environ.get("FORM") == "app":
        app = Flask(__name__)
        socketio = SocketIO(app, message_queue=url, async_mode=os.environ.get("MODE"))
    else:
        socketio = SocketIO(message_queue=url)
    if os.environ.get("GUARD") == "1":
        from flask_socketio_guard import SocketIOGuard

        # Whoever guards it is kept by it.
        socketio.last_emits_guard = SocketIOGuard(app, socketio)
    socketio.last_emits_app = app
    return socketio


if sys.argv[1:] == ["at-exit"]:
    atexit.register(lambda: work())  # before the guard registers its own: that runs first
socketio = _make()


def work() -> None:
    """Emit, and do nothing more."""
    for number in range(EVENTS):
        socketio.emit("last", number)


def work_late() -> None:
    """Emit, and say how long that took."""
    began_at = time.monotonic()
    work()
    print(time.monotonic() - began_at, flush=True)  # noqa: T201 - for the test


def main() -> None:
    """End as the first argument says."""
    how = sys.argv[1]
    if how in ("fork", "spawn", "late"):
        # The parent has used its connection, which is not the child's.
        if how != "late":
            socketio.emit("first")
        from tests.faults import last_emits

        target = last_emits.work_late if how == "late" else last_emits.work
        method = "spawn" if how == "spawn" else "fork"
        child = multiprocessing.get_context(method).Process(target=target)
        child.start()
        child.join()
        raise SystemExit(child.exitcode)
    if how == "os-fork":
        socketio.emit("first")
        child_pid = os.fork()
        if child_pid:
            raise SystemExit(os.waitpid(child_pid, 0)[1])
    if how == "at-exit":
        from flask_socketio_guard.app_guard import all_guards

        for guard in all_guards():
            guard.start()
        socketio.emit("first")
        return
    work()
    os._exit(0)


if __name__ == "__main__":
    main()
