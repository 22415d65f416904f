"""``SocketIOGuard``, the Flask extension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .public.clients import Clients
from .public.deliveries import Deliveries
from .public.guards import Guards
from .public.handlers import Handlers
from .public.process import Process
from .public.sending import Sending
from .public.setup import SetUp
from .public.tasks import Tasks

if TYPE_CHECKING:
    from flask import Flask
    from flask_socketio import SocketIO

    from .registry import Registry


class SocketIOGuard(Handlers, Sending, Deliveries, Clients, Tasks, Process):
    """Guards a Flask-SocketIO application.

    Create it with an application, or without one and call :meth:`init_app` in
    the application factory. One object can guard several applications. Each base class
    contributes the methods of one capability.

    Args:
        app: The application.
        socketio: Its ``SocketIO``, already initialised with *app*. Without an
            application: a write-only ``SocketIO(message_queue=...)``.
        settings: Any attributes of :class:`.GuardConfig`; they override ``app.config``.

    Raises:
        ConfigError: See :meth:`init_app`.
    """

    def __init__(
        self, app: Flask | None = None, socketio: SocketIO | None = None, **settings: Any
    ) -> None:
        self._guards = Guards()
        self._set_up = SetUp(self, self._guards, settings)
        if app is not None or socketio is not None:
            self.init_app(app, socketio)

    def init_app(
        self, app: Flask | None, socketio: SocketIO | None = None, **settings: Any
    ) -> None:
        """Guard *app* and its *socketio*.

        Call it after ``socketio.init_app(app)``; handlers may be registered
        before and after. Settings are read now: keywords override ``app.config``, which overrides
        environment variables of the same names, ``SOCKETIO_GUARD_*``. :class:`.GuardConfig`
        lists them.

        Args:
            app: The application, or ``None`` for a write-only *socketio*.
            socketio: Its ``SocketIO``; by default the one that *app* is initialised with.
            settings: Override those of the constructor and of *app*.

        Raises:
            ConfigError: The call is too early or repeated, or a setting is invalid.
            IncompatibleVersion: Flask-SocketIO, python-socketio or
                python-engineio is too old.
        """
        self._set_up.init_app(app, socketio, **settings)

    @property
    def registry(self) -> Registry:
        """Everything registered so far, for all applications."""
        return self._guards.registry
