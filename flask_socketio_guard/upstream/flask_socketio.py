"""The guarded side of ``flask_socketio.SocketIO``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import flask

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_socketio import SocketIO as _SocketIO
else:
    _SocketIO = object


class GuardedSocketIO(_SocketIO):
    """Goes in front of ``SocketIO``; every handler passes through here."""

    def _handle_event(
        self,
        handler: Callable[..., object],
        message: str | None,
        namespace: str,
        sid: str,
        *args: object,
    ) -> object:
        server: Any = self.server
        protected = server.guard.handlers.protect(handler, message)
        if message is None and not server.get_environ(sid, namespace=namespace):
            # The callback of a client that has left: upstream would drop it in
            # silence. It has no request any more, but its answer came.
            return protected(*args)

        def in_context(*arguments: object) -> object:
            _untie_route_error()
            return protected(*arguments)

        return super()._handle_event(in_context, message, namespace, sid, *args)

    def in_present_request(self, function: Callable[..., object]) -> Callable[..., object]:
        """Return *function* such that it runs in the request context of the present event.

        Without an event in progress it is returned as it is, as upstream's ``emit`` does.
        """
        sid = getattr(flask.request, "sid", None) if flask.has_request_context() else None
        if sid is None:
            return function
        namespace = flask.request.namespace  # type: ignore[attr-defined]
        return partial(self._handle_event, function, None, namespace, sid)

    def start_background_task(
        self, target: Callable[..., object], *args: object, **kwargs: object
    ) -> Any:
        """Start a background task; what it raises is recorded.

        Takes and returns what ``SocketIO.start_background_task`` does.
        """
        server: Any = self.server
        recorded = server.guard.handlers.recording(target)
        return super().start_background_task(recorded, *args, **kwargs)


def _untie_route_error() -> None:
    """Drop the traceback of the route that was not found.

    No route leads to the Socket.IO path, and Flask keeps the error on the
    request. Its traceback leads through every frame of the event back to the
    request: a cycle of some sixty objects for each event, payload included, that
    only the garbage collector can free, at a twentieth of the event's time.
    """
    error = flask.request.routing_exception
    if error is not None:
        error.__traceback__ = error.__context__ = None
