"""What a gunicorn worker has to say: that it has loaded the application, and that it ends.

The guard finds the worker that loads it by itself. Hooks in ``gunicorn.conf.py`` are for
applications that are made later than that, with the first request for example. They should
import this module inside of them: gunicorn reads that file in the master, before a worker
patches the standard library, and what is imported there keeps parts that block::

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
"""Exit code of a worker after which the master ends; gunicorn's ``Arbiter.WORKER_BOOT_ERROR``."""

_booted: Any = None
_joined: weakref.WeakSet[Any] = weakref.WeakSet()


def post_worker_init(worker: Any) -> None:
    """Start the guards of a worker that has loaded its application.

    When the worker is told to stop they say so to the load balancer at once, let
    its clients go, and end the application's tasks. Then nothing holds the worker,
    unless it still answers other requests: those have gunicorn's ``graceful_timeout``.

    Source:
        gunicorn settings, "Server Hooks": ``post_worker_init(worker)``.
    """
    global _booted
    _booted = worker if hasattr(worker, "cfg") else None  # one of gunicorn's
    if hasattr(worker, "wsgi") and not isinstance(worker.wsgi, CountedRequests):
        worker.wsgi = CountedRequests(worker.wsgi)
        _spare_the_collector()
    for guard in all_guards():
        if guard.is_superseded:
            continue
        if guard.app is not None:
            require_fitting(guard.server.async_mode, worker)
        is_second = guard.worker.on_drained is not None
        guard.worker.is_alive = lambda: bool(getattr(worker, "alive", True))
        guard.worker.on_drained = partial(_let_go, worker, guard)
        guard.start()
        if hasattr(worker, "cfg") and guard.app is not None and not is_second:
            _limit_connections(worker, guard)
            _tell_of_traps(worker, guard)


def _spare_the_collector() -> None:
    """Have Python's garbage collector look no more at what is there, which will stay.

    A full collection takes 20 ms or more for the modules of an application alone, in which no
    client is served, and a client that sends many lists brings about one after the other. Done
    before anything is started: tools look for greenlets with ``gc.get_objects()``, which does not
    return what is frozen.

    Source:
        Python, ``gc.freeze()``; gevent, ``gevent.util``.
    """
    gc.collect()
    gc.freeze()


def worker_exit(server: Any, worker: Any) -> None:
    """Stop the guards of a worker that ends: tasks end, the outbox empties.

    Source:
        gunicorn settings, "Server Hooks": ``worker_exit(server, worker)``.
    """
    del server
    global _booted
    if worker.pid != os.getpid():
        return  # called in the master, for a worker that was gone already
    _booted = None
    for guard in all_guards():
        if guard.lifecycle.is_stopped:
            continue
        if guard.lifecycle.is_draining:
            # gunicorn lets go once no connection is left; a handler may still run.
            guard.drain(guard.config.stop_timeout)
        guard.stop(guard.config.stop_timeout)


def booted_worker() -> Any:
    """Return the gunicorn worker of this process that has loaded its application, or ``None``."""
    return _booted if _booted is not None and _booted.pid == os.getpid() else None


def loading_worker() -> Any:
    """Return the gunicorn worker that is loading the application right now, or ``None``.

    A preloading master loads it too, and would take the listener's place in
    the message queue; nothing but the call stack tells the two apart.
    """
    return _local_of("gunicorn.workers.", "self")


def join_worker(worker: Any) -> None:
    """Have *worker* call both hooks; those of its configuration are called before."""
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
    """See that *worker* can serve a ``SocketIO`` of *async_mode*.

    Raises:
        ConfigError: No client would ever be answered.
    """
    kind = _kind_of(worker)
    if async_mode == "gevent" and kind in {"sync", "gthread"}:
        raise ConfigError(
            f"gunicorn's {kind} worker cannot serve async_mode 'gevent', which Flask-SocketIO "
            'picks where gevent is installed: create SocketIO with async_mode="threading" and '
            "run gunicorn with --threads 100, or run it with --worker-class gevent"
        )


def _kind_of(worker: Any) -> str:
    """Return gunicorn's name of the class that *worker* is made of, or an empty string."""
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(worker).__mro__}
    return next((kind for name, kind in _KINDS.items() if name in names), "")


_KINDS: Final = {
    "geventwebsocket.gunicorn.workers.GeventWebSocketWorker": "gevent-websocket",
    "gunicorn.workers.ggevent.GeventWorker": "gevent",
    "gunicorn.workers.gthread.ThreadWorker": "gthread",
    "gunicorn.workers.sync.SyncWorker": "sync",
}


def _tell_of_traps(worker: Any, guard: AppGuard) -> None:
    """Say what of gunicorn's configuration will not work."""
    kind, mode = _kind_of(worker), guard.server.async_mode
    if mode == "threading" and kind == "sync":
        logger.error(
            "gunicorn's sync worker serves one request at a time, and a client that waits "
            "for events holds it: run gunicorn with --threads 100"
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
            "gunicorn runs %d workers and hands the requests of a client that polls, as each does "
            "at first, to any of them, while its session is in one: run one worker in each of "
            "several gunicorns behind a load balancer with sticky sessions, or allow "
            'transports=["websocket"] only, on both sides',
            count,
        )
    if (
        guard.config.max_connections_per_address is not None
        and any(each.family == socket.AF_UNIX for each in worker.sockets)
        and guard.app is not None
        and not isinstance(guard.app.wsgi_app, ProxyFix)
    ):
        logger.warning(
            "SOCKETIO_GUARD_MAX_CONNECTIONS_PER_ADDRESS limits nobody: behind a Unix socket "
            "clients have no address unless app.wsgi_app = ProxyFix(app.wsgi_app) after "
            "guard.init_app() takes it from X-Forwarded-For"
        )


def _limit_connections(worker: Any, guard: AppGuard) -> None:
    """Take no more connections than there are files for, and leave some for other requests.

    Source:
        ``GeventWorker.run`` and ``ThreadWorker.run``: they read ``worker_connections`` after
        ``post_worker_init``, and accept no more than that at a time. ``TConn.wait_for_data``:
        a thread that waits for a request does so with a selector of its own.
    """
    if not hasattr(worker, "worker_connections"):
        return  # the sync worker has one at a time
    is_threaded = _kind_of(worker) == "gthread"
    most = fit_to_files(
        worker.worker_connections, selectors=worker.cfg.threads if is_threaded else 0
    )
    if most < worker.worker_connections:
        logger.warning(
            "this process may open so few files that it takes %d connections instead of %d: "
            "raise the limit (ulimit -n)",
            most,
            worker.worker_connections,
        )
        worker.worker_connections = most
    if guard.config.max_connections is None:
        guard.admission.limit_to(capacity(most))
    if is_threaded and guard.server.async_mode == "threading":
        # Beyond it requests wait for a thread, without an answer, until a client leaves.
        guard.admission.max_websockets = websockets_of(worker.cfg.threads)


class CountedRequests:
    """Goes in front of all that a worker serves, applications beside the guarded one included."""

    def __init__(self, wsgi_app: Any) -> None:
        self._wsgi_app = wsgi_app
        self._tickets: set[object] = set()

    @property
    def in_progress(self) -> int:
        """Requests in progress that have nothing to do with Socket.IO."""
        return len(self._tickets)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Serve a request, and count it until its answer is closed."""
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
    requests = worker.wsgi
    while isinstance(requests, CountedRequests) and requests.in_progress:
        guard.runtime.sleep(_POLL_INTERVAL)
    if all(other.lifecycle.is_drained for other in all_guards() if not other.is_superseded):
        rest = math.ceil(clock() - told_at) + 1
        worker.cfg.set("graceful_timeout", min(rest, worker.cfg.graceful_timeout))


def _local_of(module: str, name: str) -> Any:
    """Return a variable of the innermost caller whose module's name begins with *module*."""
    frame = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(module):
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def _after_fork() -> None:
    """Join the worker that a preloading master has forked."""
    worker = _local_of("gunicorn.arbiter", "worker")
    if worker is None or isinstance(worker.pid, int) or not all_guards():
        return  # not the fork of a worker, but one of its own children
    try:
        for guard in all_guards():
            if guard.app is not None and not guard.is_superseded:
                require_fitting(guard.server.async_mode, worker)
    except ConfigError as exc:
        # Nobody would hear of an exception here.
        logger.critical("%s", exc)
        os._exit(_BOOT_FAILED)
    join_worker(worker)


# Behind that of ``app_guard``, which makes the guards anew.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
