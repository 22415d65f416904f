"""gunicorn settings of the servers under measurement: one worker each."""

from __future__ import annotations

import os
from typing import Any

worker_class = "geventwebsocket.gunicorn.workers.GeventWebSocketWorker"
workers = 1
worker_connections = 10_000
graceful_timeout = 1
keepalive = 2
timeout = 120  # a blocked server should be measured, not killed
loglevel = "warning"

if os.environ.get("GUARD") == "1":

    def post_worker_init(worker: Any) -> None:
        """Start the guard in the worker."""
        from flask_socketio_guard import gunicorn as guard_hooks

        guard_hooks.post_worker_init(worker)

    def worker_exit(server: Any, worker: Any) -> None:
        """Stop the guard with the worker."""
        from flask_socketio_guard import gunicorn as guard_hooks

        guard_hooks.worker_exit(server, worker)
