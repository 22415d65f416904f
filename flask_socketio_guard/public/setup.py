"""Set-up of the guard of an application or of a write-only ``SocketIO``, undone if it fails."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from flask import Flask
from werkzeug.exceptions import NotFound

from ..app_guard import AppGuard, stop_superseded
from ..blueprint import add_routes
from ..config import GuardConfig
from ..errors import ConfigError
from ..gunicorn import (
    booted_worker,
    join_worker,
    loading_worker,
    post_worker_init,
    require_fitting,
)
from ..middleware import GuardMiddleware, LateMiddleware
from ..routes import require_free_paths
from ..telemetry.records import logger
from ..upstream import check_versions, given_back_on_failure, is_socketio

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from flask_socketio import SocketIO
    from werkzeug.wrappers import Response

    from .guards import Guards

KEY = "socketio_guard"
"""Key in ``app.extensions``."""


class SetUp:
    """Guards applications for one ``SocketIOGuard``.

    Args:
        owner: The ``SocketIOGuard``, stored in ``app.extensions`` under :data:`KEY`.
        guards: Receives the new guards.
        settings: Settings from the constructor; they override those of an application.
    """

    def __init__(self, owner: object, guards: Guards, settings: dict[str, Any]) -> None:
        self._owner = owner
        self._guards = guards
        self._settings = settings

    def init_app(self, app: Flask | None, socketio: SocketIO | None, **settings: Any) -> None:
        """Guard *app* and its *socketio*; see :meth:`.SocketIOGuard.init_app`."""
        check_versions()
        _require_kinds(app, socketio)
        overrides = {**self._settings, **settings}
        if app is None:
            self._init_write_only(socketio, overrides)
            return
        if KEY in app.extensions:
            raise ConfigError(
                "this app already has a SocketIOGuard: call init_app() once for each app"
            )
        socketio = _socketio_of(app, socketio)
        stop_superseded(socketio)
        config = GuardConfig.from_mapping(app.config, self._guards.registry.settings(), **overrides)
        require_free_paths(app, config)
        self._protect(app, socketio, config)

    def _protect(self, app: Flask, socketio: SocketIO, config: GuardConfig) -> None:
        """Guard *app*; if that fails, restore it and raise."""
        worker = loading_worker() or booted_worker()
        if worker is not None:
            require_fitting(socketio.server.async_mode, worker)
        served = app.wsgi_app
        with given_back_on_failure(socketio):
            guard = AppGuard(app, socketio, config, self._guards.registry)
            try:
                self._register(guard)
                add_routes(app, config, partial(_answer_health, guard))
                self._guards.add(app, guard)
                app.extensions[KEY] = self._owner
                app.wsgi_app = GuardMiddleware(served, guard)  # type: ignore[method-assign]
                if worker is not None:
                    join_worker(worker)
                    if worker is booted_worker():
                        post_worker_init(worker)
            except BaseException:
                guard.discard()
                self._guards.remove(app)
                app.extensions.pop(KEY, None)
                app.wsgi_app = served  # type: ignore[method-assign]
                raise

    def _register(self, guard: AppGuard) -> None:
        guard.register_all()
        cast("Any", guard.socketio).initialised = self._initialised

    def _initialised(self, socketio: SocketIO, app: Flask | None) -> None:
        """Guard the new server of *socketio*, whose ``init_app`` was called again.

        The new server may have other options. Its handlers are those that upstream registers
        again, and those of this ``SocketIOGuard``.

        Raises:
            ConfigError: The new server cannot be guarded; the application has no guard then.
        """
        if app is None:
            former = self._guards.write_only
            if former is not None and former.socketio is socketio:
                former.discard()
                self._guards.write_only = None
                self._protect_write_only(socketio, former.config)
            return
        guard = self._guards.of(app)
        if guard is not None and guard.socketio is socketio:
            guard.discard()
            self._guards.remove(app)
            del app.extensions[KEY]
            self._protect(app, socketio, guard.config)
        elif KEY not in app.extensions:
            # An application factory was called again. Most factories call guard.init_app() next;
            # if not, the first request does.
            late = partial(self._protect_late, app, socketio, socketio.server)
            app.wsgi_app = LateMiddleware(app, late)  # type: ignore[method-assign]

    def _protect_late(self, app: Flask, socketio: SocketIO, server: object) -> None:
        if KEY not in app.extensions and socketio.server is server:
            logger.warning(
                "the app %r shares its SocketIO with a guarded app but had no guard, and has one "
                "now: call guard.init_app(app, socketio) after socketio.init_app(app)",
                app.name,
            )
            try:
                self.init_app(app, socketio)
            except AssertionError:  # Flask's: routes cannot be added after the first request
                self.init_app(app, socketio, scripts_path=None, health_in_front=True)

    def _init_write_only(self, socketio: SocketIO | None, overrides: dict[str, Any]) -> None:
        if socketio is None or socketio.server is None:
            raise ConfigError(
                "without an app the guard needs a write-only SocketIO: "
                "SocketIOGuard(socketio=SocketIO(message_queue=...))"
            )
        if hasattr(socketio, "sockio_mw"):
            raise ConfigError(
                "this SocketIO was made with an app: pass it too, SocketIOGuard(app, socketio)"
            )
        if self._guards.write_only is not None:
            raise ConfigError("this SocketIOGuard already has a write-only SocketIO")
        declared = self._guards.registry.settings()
        self._protect_write_only(socketio, GuardConfig.from_environment(declared, **overrides))

    def _protect_write_only(self, socketio: SocketIO, config: GuardConfig) -> None:
        with given_back_on_failure(socketio):
            guard = AppGuard(None, socketio, config, self._guards.registry)
            try:
                self._register(guard)
            except BaseException:
                guard.discard()
                raise
        self._guards.write_only = guard


def _answer_health(guard: AppGuard, name: str, environ: WSGIEnvironment) -> Response:
    if guard.is_replaced:  # and the application has no new guard
        raise NotFound
    return guard.endpoints.answer(name, environ)  # not bound early: a forked child has its own


def _socketio_of(app: Flask, socketio: SocketIO | None) -> SocketIO:
    known = app.extensions.get("socketio")
    if socketio is None:
        socketio = known
    if socketio is None:
        raise ConfigError(
            "the app has no SocketIO: call socketio.init_app(app) before guard.init_app(app)"
        )
    if socketio.server is None or known is not socketio:
        raise ConfigError(
            "this SocketIO does not serve the app yet: "
            "call socketio.init_app(app) before guard.init_app(app, socketio)"
        )
    return socketio


def _require_kinds(app: object, socketio: object) -> None:
    """Check the types of the two arguments of ``init_app``, and their order."""
    if is_socketio(app):
        raise ConfigError(
            "the app comes first: SocketIOGuard(app, socketio), or guard.init_app(app, socketio)"
        )
    if app is not None and not isinstance(app, Flask):
        raise ConfigError(f"app must be a Flask application, not a {type(app).__name__}")
    if socketio is not None and not is_socketio(socketio):
        raise ConfigError(
            f"socketio must be the SocketIO of Flask-SocketIO, not a {type(socketio).__name__}"
        )
