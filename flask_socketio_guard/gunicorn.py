"""What gunicorn has to say: when a worker starts and when it ends.

Hooks for ``gunicorn.conf.py``, which should import this module inside of them:
gunicorn reads that file in the master, before a worker patches the standard
library, and what is imported there keeps parts that block::

    def post_worker_init(worker):
        from flask_socketio_guard import gunicorn
        gunicorn.post_worker_init(worker)

    def worker_exit(server, worker):
        from flask_socketio_guard import gunicorn
        gunicorn.worker_exit(server, worker)

Without them the guard starts by itself as soon as a worker has loaded the
application, except where it was preloaded; it then starts with the first request.
"""

from __future__ import annotations

import inspect
import math
import os
from functools import partial
from typing import Any

from .app_guard import AppGuard, all_guards
from .runtime import clock

_POLL_INTERVAL = 0.05  # seconds


def post_worker_init(worker: Any) -> None:
    """Start the guards of a worker that has loaded its application.

    When the worker is told to stop they say so to the load balancer at once, let
    its clients go, and end the application's tasks. Then nothing holds the worker,
    unless it still answers other requests: those have gunicorn's ``graceful_timeout``.

    Source:
        gunicorn settings, "Server Hooks": ``post_worker_init(worker)``.
    """
    for guard in all_guards():
        if guard.is_superseded:
            continue
        guard.is_worker_alive = lambda: bool(getattr(worker, "alive", True))
        guard.on_drained = partial(_let_go, worker, guard)
        guard.start()


def worker_exit(server: Any, worker: Any) -> None:
    """Stop the guards of a worker that ends: tasks end, the outbox empties.

    Source:
        gunicorn settings, "Server Hooks": ``worker_exit(server, worker)``.
    """
    del server
    if worker.pid != os.getpid():
        return  # called in the master, for a worker that was gone already
    for guard in all_guards():
        if guard.is_draining:
            # gunicorn lets go once no connection is left; a handler may still run.
            guard.drain(guard.config.stop_timeout)
        guard.stop(guard.config.stop_timeout)


def start_in_worker(guard: AppGuard) -> None:
    """Start *guard* soon, if a gunicorn worker is loading the application right now.

    A preloading master loads it too, and would take the listener's place in
    the message queue; nothing but the call stack tells the two apart.
    """
    if guard.can_listen and _is_worker_loading():
        guard.runtime.call_later(0.0, guard.start)


def _let_go(worker: Any, guard: AppGuard, stopping_for: float) -> None:
    """End the wait of *worker* for connections that have nothing more to say.

    A browser keeps its idle connections open, and gunicorn would wait for them for
    the whole ``graceful_timeout``. ``GeventWorker.run`` reads the setting anew each
    second; it is left time for one more look, in which it may see that nobody is left.

    Args:
        worker: gunicorn's.
        guard: That of the application.
        stopping_for: Seconds since the worker was told to stop.
    """
    told_at = clock() - stopping_for
    while guard.requests:
        guard.runtime.sleep(_POLL_INTERVAL)
    if all(other.is_drained for other in all_guards() if not other.is_superseded):
        rest = math.ceil(clock() - told_at) + 1
        worker.cfg.set("graceful_timeout", min(rest, worker.cfg.graceful_timeout))


def _is_worker_loading() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("gunicorn.workers."):
            return True
        frame = frame.f_back
    return False
