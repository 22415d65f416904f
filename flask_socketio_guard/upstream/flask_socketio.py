"""The guarded side of ``flask_socketio.SocketIO``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import flask

from .event_context import EventContexts, untie_route_error
from .server import GuardedServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_socketio import SocketIO as _SocketIO
else:
    _SocketIO = object


class GuardedSocketIO(_SocketIO):
    """Goes in front of ``SocketIO``; every handler passes through here."""

    event_contexts: EventContexts

    def _handle_event(
        self,
        handler: Callable[..., object],
        message: str | None,
        namespace: str,
        sid: str,
        *args: object,
    ) -> object:
        server: Any = self.server
        if not isinstance(server, GuardedServer):
            # It was initialised for another application, which has no guard.
            return super()._handle_event(handler, message, namespace, sid, *args)
        protected = server.guard.handlers.protect(handler, message)
        environ = server.get_environ(sid, namespace=namespace)
        if not environ and message is None:
            # The callback of a client that has left: upstream would drop it in
            # silence. It has no request any more, but its answer came.
            return protected(*args)
        contexts = self.event_contexts
        if environ and contexts.is_fast:
            return contexts.call(protected, message, namespace, sid, args, environ)

        def in_context(*arguments: object) -> object:
            untie_route_error(flask.request)
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
        if isinstance(server, GuardedServer):
            target = server.guard.handlers.recording(target)
        return super().start_background_task(target, *args, **kwargs)
