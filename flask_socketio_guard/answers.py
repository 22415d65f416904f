"""Responses of WSGI applications: running code once a response has been sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from werkzeug.wsgi import FileWrapper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import WSGIEnvironment

REQUEST_ENDED = "flask_socketio_guard.request_ended"
"""Key in ``environ`` of a function that ends the request's bookkeeping.

Code that keeps a request open on purpose calls it, so that shutdown does not wait for the request.
"""


def is_known_by_type(answer: object, environ: WSGIEnvironment) -> bool:
    """Return whether the server may handle *answer* by its type, so it must not be wrapped."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(answer, list | tuple | FileWrapper):
        return True
    if isinstance(wrapper, type):
        return isinstance(answer, wrapper)
    return wrapper is not None and hasattr(answer, "read")  # uWSGI's is a function


def closing(answer: Any, end: Callable[[], object], environ: WSGIEnvironment) -> Iterable[bytes]:
    """Return *answer*, wrapped if necessary, so that *end* is called when the server closes it."""
    closes = [getattr(answer, "close", None)]

    def close() -> None:
        own_close = closes.pop() if closes else None
        try:
            if own_close is not None:
                own_close()
        finally:
            end()

    if not is_known_by_type(answer, environ):
        return _Closing(answer, close)
    try:
        answer.close = close
    except AttributeError:  # a list, for example, which the server does not close
        end()
    same: Iterable[bytes] = answer
    return same


class _Closing:
    def __init__(self, answer: Iterable[bytes], close: Callable[[], None]) -> None:
        self._answer = answer
        self.close = close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._answer)
