"""The blueprint for every path of the guard: health endpoints and scripts for browsers.

``flask routes`` lists them, ``url_for("socketio_guard.healthz")`` returns their URLs, and a
``before_request`` function can exempt them by ``request.blueprint``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flask import Blueprint, Flask, has_request_context, request, send_from_directory

from .errors import ConfigError
from .routes import BLUEPRINT, SCRIPT_FILE, health_paths

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIEnvironment
    from werkzeug.wrappers import Response as Answer

    from .config import GuardConfig

_FOLDER = Path(__file__).with_name("static")
_HOUR = 3600
_HOST: Final = "socketio_guard_host"
"""Name of the variable in a rule that matches every host or subdomain."""


class GuardBlueprint(Blueprint):
    """The guard's routes in one application.

    Args:
        app: The application.
        config: The configured paths.
    """

    def __init__(self, app: Flask, config: GuardConfig) -> None:
        # No static folder: it would add a route of its own.
        super().__init__(BLUEPRINT, __name__)
        self.health: Callable[[str, WSGIEnvironment], Answer]
        """Answers a request, given the name of an endpoint; replaced with the guard."""
        for name, path in health_paths(config).items():
            # Health answers OPTIONS like GET, here and in front of the application.
            self._add(app, path, name, self._answering(name), provide_automatic_options=False)
        if config.scripts_path is not None:
            # Only this file: the application's catch-all route may serve other files below.
            rule = f"{config.scripts_path}/<any({SCRIPT_FILE!r}):filename>"
            self._add(app, rule, "static", _script)
        if app.url_map.host_matching:
            self.url_defaults(lambda _, values: values.setdefault(_HOST, _host(app)))
        self.url_value_preprocessor(lambda _, values: values and values.pop(_HOST, None))

    def _add(
        self, app: Flask, rule: str, endpoint: str, view: Callable[..., Answer], **options: bool
    ) -> None:
        """Add a rule that matches every host: load balancers send an IP address as the host."""
        hosts: list[dict[str, Any]] = [{}]
        if app.url_map.host_matching:
            hosts = [{"host": f"<{_HOST}>"}]
        elif app.subdomain_matching:
            hosts = [{}, {"subdomain": f"<{_HOST}>"}]
        for host in hosts:
            self.add_url_rule(rule, endpoint, view, **host, **options)

    def _answering(self, name: str) -> Callable[..., Answer]:
        return lambda: self.health(name, request.environ)


def add_routes(
    app: Flask, config: GuardConfig, health: Callable[[str, WSGIEnvironment], Answer]
) -> None:
    """Add the guard's routes to *app*; if it has them already, connect them to a new guard.

    Args:
        app: The application.
        config: The configured paths.
        health: Answers a request, given the name of an endpoint.

    Raises:
        ConfigError: The application has a blueprint of the same name.
        AssertionError: Flask refuses new routes, because it has handled a request.
    """
    if config.scripts_path is None and not health_paths(config):
        return
    known = app.blueprints.get(BLUEPRINT)
    if known is not None and not isinstance(known, GuardBlueprint):
        raise ConfigError(
            f"the application has a blueprint {BLUEPRINT!r}, which is the name of the guard's: "
            "rename it"
        )
    if known is None:
        known = GuardBlueprint(app, config)
        try:
            app.register_blueprint(known)
        except AssertionError:
            if config.scripts_path is not None or not config.health_in_front:
                raise
    known.health = health


def _host(app: Flask) -> str:
    return request.host if has_request_context() else app.config["SERVER_NAME"] or "localhost"


def _script(filename: str) -> Answer:
    return send_from_directory(_FOLDER, filename, max_age=_HOUR)
