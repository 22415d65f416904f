"""A configuration for gunicorn: one guarded process per address.

    gunicorn -c python:flask_socketio_guard_gunicorn "myapp:create_app()"

Or in your own ``gunicorn.conf.py``, with overrides below the import::

    from flask_socketio_guard_gunicorn import *

    timeout = 60

Environment:
    HOST: Address to listen on (default ``127.0.0.1``).
    PORT: Port to listen on (default ``5000``).
    SOCKETIO_GUARD_MAX_CONNECTIONS: Socket.IO clients this process accepts (default ``1000``).

This module is not part of the package on purpose. The master reads it before any worker has
patched the standard library, and importing a module of the package would import the package, too.
Modules imported that early (ssl, redis) keep references to blocking functions.
"""

from __future__ import annotations

import os
import queue
from typing import Any

bind = f"{os.environ.get('HOST', '127.0.0.1')}:{os.environ.get('PORT', '5000')}"

# WebSockets under gevent. The worker patches the standard library before it loads the
# application, so the application needs no monkey.patch_all().
worker_class = "geventwebsocket.gunicorn.workers.GeventWebSocketWorker"

# One worker per process. A Socket.IO session lives in the memory of one worker, and a client
# that polls (as each does before its upgrade to WebSocket) makes several requests that must all
# reach that worker; gunicorn hands each to whichever worker accepts first. To scale, run processes
# on separate addresses behind a load balancer with sticky sessions; the message queue connects
# them.
workers = 1

# The worker serves everything from one pool of connections. If that were as large as the number of
# clients that the guard admits, a full process could not answer the load balancer's health check
# and would be taken for dead. So the guard refuses new Socket.IO handshakes at `_max_connections`,
# and the pool is larger: for health checks, pages and refused handshakes, for the second connection
# of a client that upgrades from polling, and for idle keep-alive connections, which hold a slot,
# too.
_max_connections = int(os.environ.get("SOCKETIO_GUARD_MAX_CONNECTIONS", "1000"))
worker_connections = _max_connections + max(64, _max_connections // 4)
raw_env = [f"SOCKETIO_GUARD_MAX_CONNECTIONS={_max_connections}"]

# The longest graceful shutdown; afterwards the master kills the worker. Usually it takes a second
# or two: the guard disconnects the clients, ends tasks and empties the outbox, and does not wait
# for idle keep-alive connections. The rest is for HTTP requests in progress, and for handlers,
# tasks and a broker that delay it: SOCKETIO_GUARD_STOP_TIMEOUT and
# SOCKETIO_GUARD_EXIT_FLUSH_TIMEOUT, 5 s each, and each up to twice.
graceful_timeout = 30

# The worker's heartbeat is sent by a greenlet: a worker whose event loop is blocked for this long
# serves no client, and is replaced.
timeout = 30

# All gunicorn processes of a user would share its default path, and several run on one machine.
control_socket_disable = True

# Preloading saves memory between the workers of one master. Here each master has one worker, so
# it would save nothing, and a reload (SIGHUP) would no longer load new code.
preload_app = False


def when_ready(server: Any) -> None:
    """Make a master that preloading has monkey-patched notice that its worker died.

    Without this, ``gunicorn --preload`` with an application module that calls gevent's
    ``monkey.patch_all()`` never replaces a dead worker:

    - ``Arbiter.__init__`` (gunicorn/arbiter.py) makes ``SIG_QUEUE``, the standard
      ``queue.SimpleQueue``, *before* ``Arbiter.setup`` loads the application that patches.
    - ``Arbiter.init_signals`` then sets its SIGCHLD handler with ``signal.signal``, which is now
      ``gevent.signal.signal``. For SIGCHLD that installs no handler in the operating system: it
      stores the handler, and the event loop calls it when a child watcher of
      ``gevent.os.fork_and_watch`` (now ``os.fork``) fires.
    - ``Arbiter.wait_for_signals`` blocks the thread in the native ``SimpleQueue.get``. It never
      switches to gevent's hub: the loop does not run, the watcher does not fire,
      ``Arbiter.signal_chld`` is not called, and ``Arbiter.reap_workers``, which only a queued
      SIGCHLD leads to, leaves the worker in ``WORKERS`` as a zombie. Other signals have ordinary
      handlers and do arrive, which is why the master still stops at SIGTERM.

    A queue created now is gevent's if the master is patched: waiting on it runs the loop. In an
    unpatched master it is a standard one again.
    """
    early, server.SIG_QUEUE = server.SIG_QUEUE, queue.SimpleQueue()
    while not early.empty():
        server.SIG_QUEUE.put_nowait(early.get_nowait())


# The hooks import the package only when they are called, in a worker.


def post_worker_init(worker: Any) -> None:
    """Start the guard in the worker, before the first client; at SIGTERM it drains."""
    from flask_socketio_guard import gunicorn as guard_hooks

    guard_hooks.post_worker_init(worker)


def worker_exit(server: Any, worker: Any) -> None:
    """Stop the rest of the guard, and send what its outbox still holds."""
    # gunicorn also calls this in the master, for a worker that ended before it could be killed.
    if worker.pid == os.getpid():
        from flask_socketio_guard import gunicorn as guard_hooks

        guard_hooks.worker_exit(server, worker)
