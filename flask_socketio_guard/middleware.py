"""WSGI middleware in front of the application: health endpoints and the start of the guard."""

from __future__ import annotations

from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from .answers import REQUEST_ENDED, is_known_by_type
from .telemetry.records import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from flask import Flask

    from .app_guard import AppGuard

_END: Any = object()


class GuardMiddleware:
    """Answers health requests, starts the guard with the first request, and serves the rest.

    Args:
        wsgi_app: The application's previous ``wsgi_app``.
        guard: The guard of the application.
    """

    def __init__(self, wsgi_app: WSGIApplication, guard: AppGuard) -> None:
        self._wsgi_app = wsgi_app
        self._guard = guard
        self._is_answering_health = guard.config.health_in_front
        self._has_checked_paths = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        guard = self._guard
        if guard.is_replaced:
            return self._wsgi_app(environ, start_response)
        path = environ.get("PATH_INFO", "")
        if not self._has_checked_paths:
            # Again: a worker with threads starts the guard while the application still loads.
            guard.check_paths()
            self._has_checked_paths = True
            _warn_of_server(environ, guard)
        if not guard.lifecycle.has_served:
            self._start(environ, path)
        if guard.admission.is_draining:
            start_response = _closing(start_response)
        if self._is_answering_health and guard.endpoints.handles(path):
            return guard.endpoints(environ, start_response)
        engineio_path: str = guard.socketio.sockio_mw.engineio_path
        if not path.startswith(engineio_path):
            return self._serve_http(environ, start_response)
        if (request_ended := environ.get(REQUEST_ENDED)) is not None:
            request_ended()
        return self._call_app(environ, start_response)[0]

    def _call_app(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> tuple[Iterable[bytes], Context | None]:
        """Return the application's response, and the context in which to iterate over it.

        Servers handle consecutive requests in the context of a thread or of a TCP connection,
        which a proxy shares among clients. A context of its own keeps one request's context
        variables from leaking into the next. Tests get none: they may inspect the variables.
        """
        if not _is_served(environ):
            return self._wsgi_app(environ, start_response), None
        context = copy_context()
        return context.run(self._wsgi_app, environ, start_response), context

    def _start(self, environ: WSGIEnvironment, path: str) -> None:
        """Start the guard, unless this process is a test or a command with a message queue.

        Raises:
            ConfigError: The process serves clients but cannot receive messages of others.
        """
        guard = self._guard
        is_served = _is_served(environ)
        if not guard.can_listen:
            if is_served and path.startswith(guard.socketio.sockio_mw.engineio_path):
                guard.start()
        elif is_served or guard.queue is None or guard.endpoints.handles(path):
            guard.start()

    def _serve_http(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve a request that is not a Socket.IO request."""
        answer, context = self._call_app(environ, start_response)
        if context is None or is_known_by_type(answer, environ):
            return answer
        return _Answer(answer, context)


class LateMiddleware:
    """Guards an application at its first request from a server, unless it is guarded by then.

    Args:
        app: The application.
        guard: Guards the application if necessary; called once.
    """

    def __init__(self, app: Flask, guard: Callable[[], object]) -> None:
        self._app = app
        self._wsgi_app = app.wsgi_app
        self._guard = guard
        self._is_due = True

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        if self._is_due and _is_served(environ):
            self._guard()
            self._is_due = False
            return self._app.wsgi_app(environ, start_response)
        return self._wsgi_app(environ, start_response)


def _is_served(environ: WSGIEnvironment) -> bool:
    # Servers identify themselves; test clients, Werkzeug's included, do not.
    return "SERVER_SOFTWARE" in environ or "uwsgi.version" in environ


def _warn_of_server(environ: WSGIEnvironment, guard: AppGuard) -> None:
    """Log an error if Flask's development server runs with gevent, which it cannot serve.

    Under ``flask run``, Flask-SocketIO picks threading unless the application names a mode.
    """
    if environ.get("SERVER_SOFTWARE", "").startswith("Werkzeug/") and guard.has_loop():
        logger.error(
            "flask run cannot serve async_mode %r: no WebSocket works, and without "
            "gevent.monkey.patch_all() polling hangs too: start with socketio.run(app), or use "
            'SocketIO(async_mode="threading") under flask run',
            guard.server.async_mode,
        )


class _Answer:
    """A response that is iterated over in the context of its request."""

    def __init__(self, answer: Iterable[bytes], context: Context) -> None:
        self._answer = answer
        self._context = context

    def __iter__(self) -> Iterator[bytes]:
        # A token of a context variable is valid in the context that created it only.
        run = self._context.run
        return iter(partial(run, next, run(iter, self._answer)), _END)

    def close(self) -> None:
        """Close the application's response."""
        close = getattr(self._answer, "close", None)
        if close is not None:
            self._context.run(close)


def _closing(start_response: StartResponse) -> StartResponse:
    """Wrap *start_response* to close the connection after the response.

    An idle connection would delay the shutdown of the worker. gunicorn's own
    workers handle that themselves and ignore the header; gevent's server obeys it.
    """

    def start(status: str, headers: list[tuple[str, str]], *args: Any) -> Callable[[bytes], object]:
        return start_response(status, [*headers, ("Connection", "close")], *args)

    return start
