"""How Flask-SocketIO-Guard is deployed: one guarded gunicorn process per address.

    gunicorn -c gunicorn.conf.py "example_app.app:create_app()"

Environment:
    HOST: Address to listen at (default ``127.0.0.1``).
    PORT: Port to listen at (default ``5000``).
    MAX_CONNECTIONS: Socket.IO clients this process accepts (default ``1000``).
    GRACEFUL_TIMEOUT: Whole seconds that a stopping worker leaves its clients (default ``5``).
"""

from __future__ import annotations

import os
import queue
from typing import Any

bind = f"{os.environ.get('HOST', '127.0.0.1')}:{os.environ.get('PORT', '5000')}"

# WebSockets under gevent. The worker patches the standard library itself, before it loads the
# application, so the application needs no monkey.patch_all() of its own.
worker_class = "geventwebsocket.gunicorn.workers.GeventWebSocketWorker"

# One worker per process. A Socket.IO session lives in the memory of one worker, and a client
# that polls (as each does before its WebSocket is up) makes several requests that must all
# reach that worker; gunicorn hands each to whichever worker accepts first. Scale by processes on
# addresses of their own, behind a load balancer with sticky sessions; the message queue
# connects them.
workers = 1

# The worker serves everything from one pool of connections. Were it the size of what the guard
# admits, a full house would leave no slot to answer the load balancer's health check, and the
# process would be taken for dead. So the guard refuses new Socket.IO handshakes at
# `_max_connections`, and the pool is larger: for health checks, for pages, for handshakes that
# are to be refused, for the second connection a client holds while it upgrades from polling, and
# for idle keep-alive connections, which hold a slot too.
_max_connections = int(os.environ.get("MAX_CONNECTIONS", "1000"))
worker_connections = _max_connections + max(64, _max_connections // 4)
# Read by the application with app.config.from_prefixed_env().
raw_env = [f"FLASK_SOCKETIO_GUARD_MAX_CONNECTIONS={_max_connections}"]

# Enough for replies under way. Not more: an open WebSocket never finishes by itself, so a
# stopping worker with clients always takes the whole time, and the clients can only go on
# elsewhere once it is over.
_client_timeout = int(os.environ.get("GRACEFUL_TIMEOUT", "5"))

# The worker waits for its clients that long, and then ends tasks and empties the outbox
# (worker_exit below). The master kills it at `graceful_timeout`, counted from the same signal: were
# that the same time, no worker with an open WebSocket would ever come to its end. So the
# worker is given less, see post_fork. The rest: gevent's worker looks once a second whether it is
# to stop and whether its clients are gone, and takes a second to end them; then the guard has
# SOCKETIO_GUARD_STOP_TIMEOUT and SOCKETIO_GUARD_EXIT_FLUSH_TIMEOUT (5 s each), which it
# needs only if a task hangs or the broker is away.
graceful_timeout = _client_timeout + 3 + 5 + 5

# The heartbeat of the worker is a greenlet: a worker whose event loop is blocked for this long
# serves nobody and is replaced.
timeout = 30

# Its default path is one for all gunicorn processes of a user, and here several share a machine.
control_socket_disable = True

# Preloading saves memory between the workers of one master. Here each master has one worker, so
# it would save nothing, and a reload (SIGHUP) would no longer load new code.
preload_app = False


def when_ready(server: Any) -> None:
    """Let a master that was monkey-patched by preloading see that its worker died.

    Without this, ``gunicorn --preload`` with an application module that calls gevent's
    ``monkey.patch_all()`` never replaces a dead worker:

    - ``Arbiter.__init__`` (gunicorn/arbiter.py) makes ``SIG_QUEUE``, the standard
      ``queue.SimpleQueue``, *before* ``Arbiter.setup`` loads the application that patches.
    - ``Arbiter.init_signals`` then sets its SIGCHLD handler through what has become
      ``gevent.signal.signal``. That one installs nothing in the operating system: it stores the
      handler, to be called by the event loop when a child watcher of ``gevent.os.fork_and_watch``
      (now ``os.fork``) fires.
    - ``Arbiter.wait_for_signals`` blocks the thread in the native ``SimpleQueue.get``. It never
      switches to gevent's hub: the loop does not run, the watcher does not fire,
      ``Arbiter.signal_chld`` is not called, and ``Arbiter.reap_workers``, which only a queued
      SIGCHLD leads to, leaves the worker in ``WORKERS`` as a zombie. Other signals have ordinary
      handlers and do arrive, which is why the master still stops at SIGTERM.

    A queue made now is gevent's if the master is patched: waiting on it runs the loop. In an
    unpatched master it is the standard one again.
    """
    early, server.SIG_QUEUE = server.SIG_QUEUE, queue.SimpleQueue()
    while not early.empty():
        server.SIG_QUEUE.put_nowait(early.get_nowait())


def post_fork(server: Any, worker: Any) -> None:
    """Have the worker finish before the master's patience ends; its `cfg` is its own by now."""
    worker.cfg.set("graceful_timeout", _client_timeout)


# The hooks below import the package, and not this file as a whole: the master reads it before any
# worker has patched the standard library, and what is imported then (ssl, redis) keeps parts that
# block.


def post_worker_init(worker: Any) -> None:
    """Start the guard in the worker, after the fork and before the first client."""
    from flask_socketio_guard import gunicorn as guard_hooks

    guard_hooks.post_worker_init(worker)


def worker_exit(server: Any, worker: Any) -> None:
    """Stop the guard's tasks and send what its outbox still holds."""
    # gunicorn also calls this in the master, for a worker that was gone before it could be killed.
    if worker.pid == os.getpid():
        from flask_socketio_guard import gunicorn as guard_hooks

        guard_hooks.worker_exit(server, worker)
