"""Hooks for gunicorn: start after a worker has loaded the application, graceful shutdown after.

The guard finds the worker that loads it by itself. Hooks in ``gunicorn.conf.py`` are only needed
for applications that are created later, for example with the first request. The hooks must import
this module in their bodies: gunicorn reads that file in the master, before a worker patches the
standard library, and modules imported there keep references to functions that block::

    def post_worker_init(worker):
        from flask_socketio_guard import gunicorn
        gunicorn.post_worker_init(worker)

    def worker_exit(server, worker):
        from flask_socketio_guard import gunicorn
        gunicorn.worker_exit(server, worker)
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import socket
import weakref
from functools import partial
from typing import Any, Final

from werkzeug.middleware.proxy_fix import ProxyFix

from .answers import REQUEST_ENDED, closing
from .app_guard import AppGuard, all_guards
from .clients.admission import capacity, fit_to_files, websockets_of
from .core.runtime import clock
from .errors import ConfigError
from .telemetry.records import logger

__all__ = ["post_worker_init", "worker_exit"]

_POLL_INTERVAL = 0.05  # seconds
_BOOT_FAILED: Final = 3
"""Exit code that makes the master exit too; gunicorn's ``Arbiter.WORKER_BOOT_ERROR``."""

_booted: Any = None
_joined: weakref.WeakSet[Any] = weakref.WeakSet()


def post_worker_init(worker: Any) -> None:
    """Start the guards of a worker that has loaded its application.

    When the worker is told to stop, the guards report unready at once, drain the
    clients and stop the application's tasks. After that, only other requests in
    progress keep the worker running, for up to gunicorn's ``graceful_timeout``.

    Source:
        gunicorn settings, "Server Hooks": ``post_worker_init(worker)``.
    """
    global _booted
    _booted = worker if hasattr(worker, "cfg") else None  # cfg: it is gunicorn's own
    if hasattr(worker, "wsgi") and not isinstance(worker.wsgi, CountedRequests):
        worker.wsgi = CountedRequests(worker.wsgi)
        _freeze_objects()
    for guard in all_guards():
        if guard.is_superseded:
            continue
        if guard.app is not None:
            require_fitting(guard.server.async_mode, worker)
        is_second = guard.worker.on_drained is not None
        guard.worker.is_alive = lambda: bool(getattr(worker, "alive", True))
        guard.worker.on_drained = partial(_shorten_shutdown, worker, guard)
        guard.start()
        if hasattr(worker, "cfg") and guard.app is not None and not is_second:
            _limit_connections(worker, guard)
            _warn_of_misconfiguration(worker, guard)


def _freeze_objects() -> None:
    """Exclude existing objects, which will stay anyway, from Python's garbage collection.

    A full collection takes 20 ms or more for the modules of an application alone and blocks all
    clients meanwhile, and a client that sends many lists causes one after another. It runs before
    any task starts: tools find greenlets with ``gc.get_objects()``, which omits frozen objects.

    Source:
        Python, ``gc.freeze()``; gevent, ``gevent.util``.
    """
    gc.collect()
    gc.freeze()


def worker_exit(server: Any, worker: Any) -> None:
    """Stop the guards of a worker that exits: stop their tasks and empty their outboxes.

    Source:
        gunicorn settings, "Server Hooks": ``worker_exit(server, worker)``.
    """
    del server
    global _booted
    if worker.pid != os.getpid():
        return  # called in the master for a worker that has already exited
    _booted = None
    for guard in all_guards():
        if guard.lifecycle.is_stopped:
            continue
        if guard.lifecycle.is_draining:
            # gunicorn stops waiting once no connection is left; a handler may still run.
            guard.drain(guard.config.stop_timeout)
        guard.stop(guard.config.stop_timeout)


def booted_worker() -> Any:
    """Return the gunicorn worker of this process that has loaded its application, or ``None``."""
    return _booted if _booted is not None and _booted.pid == os.getpid() else None


def loading_worker() -> Any:
    """Return the gunicorn worker that is loading the application right now, or ``None``.

    A preloading master loads the application too, but must not listen on the message
    queue. Only the call stack tells the two apart.
    """
    return _local_of("gunicorn.workers.", "self")


def join_worker(worker: Any) -> None:
    """Install both hooks in *worker*; they run after those of its configuration."""
    if worker in _joined:
        return
    _joined.add(worker)
    on_init, on_exit = worker.cfg.post_worker_init, worker.cfg.worker_exit

    def init(worker: Any) -> None:
        on_init(worker)
        post_worker_init(worker)

    def end(server: Any, worker: Any) -> None:
        on_exit(server, worker)
        worker_exit(server, worker)

    worker.cfg.set("post_worker_init", init)
    worker.cfg.set("worker_exit", end)


def require_fitting(async_mode: str, worker: Any) -> None:
    """Check that *worker* can serve a ``SocketIO`` of *async_mode*.

    Raises:
        ConfigError: It cannot, and would never answer a client.
    """
    kind = _kind_of(worker)
    if async_mode == "gevent" and kind in {"sync", "gthread"}:
        raise ConfigError(
            f"gunicorn's {kind} worker cannot serve async_mode 'gevent', which Flask-SocketIO "
            'picks where gevent is installed: create SocketIO with async_mode="threading" and '
            "run gunicorn with --threads 100, or run it with --worker-class gevent"
        )


def _kind_of(worker: Any) -> str:
    """Return gunicorn's name for the class of *worker*; empty if it is not in ``_KINDS``."""
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(worker).__mro__}
    return next((kind for name, kind in _KINDS.items() if name in names), "")


_KINDS: Final = {
    "geventwebsocket.gunicorn.workers.GeventWebSocketWorker": "gevent-websocket",
    "gunicorn.workers.ggevent.GeventWorker": "gevent",
    "gunicorn.workers.gthread.ThreadWorker": "gthread",
    "gunicorn.workers.sync.SyncWorker": "sync",
}


def _warn_of_misconfiguration(worker: Any, guard: AppGuard) -> None:
    """Log what will not work with gunicorn's configuration."""
    kind, mode = _kind_of(worker), guard.server.async_mode
    if mode == "threading" and kind == "sync":
        logger.error(
            "gunicorn's sync worker serves one request at a time, and a client that waits "
            "for events occupies it: run gunicorn with --threads 100"
        )
    if mode == "threading" and kind == "gevent-websocket":
        logger.warning(
            "async_mode 'threading' cannot use the WebSockets of %s: run gunicorn with "
            '--worker-class gevent, or create SocketIO with async_mode="gevent"',
            type(worker).__name__,
        )
    count = worker.cfg.workers
    if count > 1 and worker.age == 1 and "polling" in guard.server.eio.transports:
        logger.error(
            "gunicorn runs %d workers and distributes the requests of a polling client (every "
            "client starts with polling) among them, but its session exists in only one: run "
            "several gunicorns with one worker each behind a load balancer with sticky sessions, "
            'or allow only transports=["websocket"], on both sides',
            count,
        )
    if (
        guard.config.max_connections_per_address is not None
        and any(each.family == socket.AF_UNIX for each in worker.sockets)
        and guard.app is not None
        and not isinstance(guard.app.wsgi_app, ProxyFix)
    ):
        logger.warning(
            "SOCKETIO_GUARD_MAX_CONNECTIONS_PER_ADDRESS has no effect: behind a Unix socket "
            "clients have no address. To take it from X-Forwarded-For, set "
            "app.wsgi_app = ProxyFix(app.wsgi_app) after guard.init_app()"
        )


def _limit_connections(worker: Any, guard: AppGuard) -> None:
    """Limit connections to the available file descriptors, with a reserve for other requests.

    Source:
        ``GeventWorker.run`` and ``ThreadWorker.run`` read ``worker_connections`` after
        ``post_worker_init``, and accept at most that many connections at a time. In
        ``TConn.wait_for_data``, each thread that waits for a request opens a selector.
    """
    if not hasattr(worker, "worker_connections"):
        return  # the sync worker serves one connection at a time
    is_threaded = _kind_of(worker) == "gthread"
    most = fit_to_files(
        worker.worker_connections, selectors=worker.cfg.threads if is_threaded else 0
    )
    if most < worker.worker_connections:
        logger.warning(
            "the limit of open files allows %d connections instead of %d: "
            "raise the limit (ulimit -n)",
            most,
            worker.worker_connections,
        )
        worker.worker_connections = most
    if guard.config.max_connections is None:
        guard.admission.limit_to(capacity(most))
    if is_threaded and guard.server.async_mode == "threading":
        # With more WebSockets than that, other requests would wait for a free thread until a
        # client disconnects.
        guard.admission.max_websockets = websockets_of(worker.cfg.threads)


class CountedRequests:
    """WSGI middleware that counts a worker's requests, including those of other applications."""

    def __init__(self, wsgi_app: Any) -> None:
        self._wsgi_app = wsgi_app
        self._tickets: set[object] = set()

    @property
    def in_progress(self) -> int:
        """Number of requests in progress that are not Socket.IO requests."""
        return len(self._tickets)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Serve a request, and count it until its response is closed."""
        ticket = object()
        end = partial(self._tickets.discard, ticket)
        self._tickets.add(ticket)
        environ[REQUEST_ENDED] = end
        try:
            answer = self._wsgi_app(environ, start_response)
        except BaseException:
            end()
            raise
        return closing(answer, end, environ)


def _shorten_shutdown(worker: Any, guard: AppGuard, stopping_for: float) -> None:
    """Make *worker* stop waiting for idle connections once its guards are drained.

    A browser keeps idle connections open, and gunicorn would wait for them for the
    whole ``graceful_timeout``. ``GeventWorker.run`` reads that setting again each
    second, so it is lowered to a value that leaves time for one more check.

    Args:
        worker: The gunicorn worker.
        guard: The guard of the application.
        stopping_for: Seconds since the worker was told to stop.
    """
    stopping_since = clock() - stopping_for
    requests = worker.wsgi
    while isinstance(requests, CountedRequests) and requests.in_progress:
        guard.runtime.sleep(_POLL_INTERVAL)
    if all(other.lifecycle.is_drained for other in all_guards() if not other.is_superseded):
        timeout = math.ceil(clock() - stopping_since) + 1
        worker.cfg.set("graceful_timeout", min(timeout, worker.cfg.graceful_timeout))


def _local_of(module: str, name: str) -> Any:
    """Return a variable of the innermost caller whose module's name begins with *module*."""
    frame = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(module):
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def _after_fork() -> None:
    """Install the hooks in a worker that a preloading master has forked."""
    worker = _local_of("gunicorn.arbiter", "worker")
    if worker is None or isinstance(worker.pid, int) or not all_guards():
        return  # not a worker, but a child process of a worker
    try:
        for guard in all_guards():
            if guard.app is not None and not guard.is_superseded:
                require_fitting(guard.server.async_mode, worker)
    except ConfigError as exc:
        # Python ignores exceptions in functions that run after a fork.
        logger.critical("%s", exc)
        os._exit(_BOOT_FAILED)
    join_worker(worker)


# Registered after the function of ``app_guard`` that rebuilds the guards, and so runs after it.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
