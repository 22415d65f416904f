"""The WSGI side: what stands in front of an application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from werkzeug.wsgi import FileWrapper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from .app_guard import AppGuard


class GuardMiddleware:
    """Goes in front of an application: health, start, and requests that are counted.

    Args:
        wsgi_app: What was there before.
        guard: The guard of the application.
    """

    def __init__(self, wsgi_app: WSGIApplication, guard: AppGuard) -> None:
        self._wsgi_app = wsgi_app
        self._guard = guard
        self._has_checked_paths = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        guard = self._guard
        path = environ.get("PATH_INFO", "")
        if not self._has_checked_paths:
            guard.check_paths()  # a worker with threads starts while the application is loading
            self._has_checked_paths = True
        if not guard.has_started:
            self._start(environ, path)
        if guard.admission.is_draining:
            start_response = _closing(start_response)
        if guard.endpoints.handles(path):
            return guard.endpoints(environ, start_response)
        engineio_path: str = guard.socketio.sockio_mw.engineio_path
        if not path.startswith(engineio_path):
            return self._serve_http(environ, start_response)
        return self._wsgi_app(environ, start_response)

    def _start(self, environ: WSGIEnvironment, path: str) -> None:
        """Start the guard if this process serves, and is not a test or a command.

        Raises:
            ConfigError: It serves clients, and cannot.
        """
        guard = self._guard
        # Servers name themselves; Werkzeug's test client, and those of others, do not.
        is_served = "SERVER_SOFTWARE" in environ or "uwsgi.version" in environ
        if not guard.can_listen:
            if is_served and path.startswith(guard.socketio.sockio_mw.engineio_path):
                guard.start()
        elif is_served or guard.outbox is None or guard.endpoints.handles(path):
            guard.start()

    def _serve_http(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve a request that has nothing to do with Socket.IO, and count it meanwhile."""
        guard = self._guard
        guard.requests += 1
        try:
            answer = self._wsgi_app(environ, start_response)
        except BaseException:
            guard.requests -= 1
            raise
        if isinstance(answer, list | tuple | FileWrapper) or _is_file(answer, environ):
            guard.requests -= 1  # the server knows it by its type, and may send it in its own way
            return answer
        return _Answer(answer, guard)


class _Answer:
    """An answer that counts as a request in progress until it is closed."""

    def __init__(self, answer: Iterable[bytes], guard: AppGuard) -> None:
        self._answer = answer
        self._guard: AppGuard | None = guard

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._answer)

    def close(self) -> None:
        """Close the application's answer."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        try:
            close = getattr(self._answer, "close", None)
            if close is not None:
                close()
        finally:
            guard.requests -= 1


def _is_file(answer: object, environ: WSGIEnvironment) -> bool:
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(answer, wrapper)


def _closing(start_response: StartResponse) -> StartResponse:
    """Return *start_response* such that the connection is closed after the answer.

    An idle connection would hold the worker that is to end. gunicorn's own
    workers see to that themselves and ignore the header; gevent's server heeds it.
    """

    def start(status: str, headers: list[tuple[str, str]], *args: Any) -> Callable[[bytes], object]:
        return start_response(status, [*headers, ("Connection", "close")], *args)

    return start
