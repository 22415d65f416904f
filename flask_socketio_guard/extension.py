"""``SocketIOGuard``: the extension object that applications hold."""

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

    Create it with an application, or without one and call :meth:`init_app`
    from the application factory. One object can guard several applications. What it offers is
    one base class for each capability.

    Args:
        app: The application.
        socketio: Its ``SocketIO``, initialised with *app* before. Without an
            application: a write-only ``SocketIO(message_queue=...)``.
        settings: Any attribute of :class:`.GuardConfig`; wins over ``app.config``.

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
        before and after. Settings are read now: keywords win over ``app.config``, and that over
        environment variables, which have the same names, ``SOCKETIO_GUARD_*``.
        :class:`.GuardConfig` lists them all.

        Args:
            app: The application, or ``None`` for a write-only *socketio*.
            socketio: Its ``SocketIO``; taken from the application if left out.
            settings: Win over those of the constructor and of *app*.

        Raises:
            ConfigError: The call comes too early or twice, or a setting is wrong.
            IncompatibleVersion: Flask-SocketIO, python-socketio or
                python-engineio is too old.
        """
        self._set_up.init_app(app, socketio, **settings)

    @property
    def registry(self) -> Registry:
        """What was registered, for every application."""
        return self._guards.registry
