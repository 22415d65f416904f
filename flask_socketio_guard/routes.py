"""Paths that the guard answers, and the check that they hide no route of the application."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, RequestRedirect
from werkzeug.security import safe_join

from .errors import ConfigError
from .settings import PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Flask
    from werkzeug.routing import BaseConverter, Rule

    from .config import GuardConfig

BLUEPRINT = "socketio_guard"
"""Name of the blueprint with the guard's own routes."""

SCRIPT_FILE = "deliveries.js"
"""Script that browsers load for acknowledged delivery."""

_STATIC = "static"
"""Endpoint of the static files of an application; in a blueprint, after the blueprint's name."""


def require_free_paths(app: Flask, config: GuardConfig) -> None:
    """Check that the guard's paths hide no route of *app*.

    A catch-all route does not count: it serves what no other route does, and the
    guard's paths are other routes.

    Raises:
        ConfigError: A path of the guard would hide a route.
    """
    for setting, path in _paths(config):
        for rule in app.url_map.iter_rules():
            if _is_for(rule, path, app) and not rule.endpoint.startswith(f"{BLUEPRINT}."):
                key = f"{PREFIX}{setting}".upper()
                raise ConfigError(
                    f"the application's route {rule.rule!r} (endpoint {rule.endpoint!r}) would be "
                    f"hidden by the guard's {path!r}: move the guard's with {key}, or switch it "
                    "off with None"
                )


def health_paths(config: GuardConfig) -> dict[str, str]:
    """Return the health paths that are enabled, by the names of their endpoints."""
    paths = {name: getattr(config, f"{name}_path") for name in ("healthz", "readyz", "livez")}
    return {name: path for name, path in paths.items() if path is not None}


def _paths(config: GuardConfig) -> Iterator[tuple[str, str]]:
    """Yield each path that the guard answers, with the name of the setting that controls it."""
    for name, path in reversed(health_paths(config).items()):
        yield f"{name}_path", path
    if config.scripts_path is not None:
        yield "scripts_path", f"{config.scripts_path}/{SCRIPT_FILE}"


def _is_for(rule: Rule, path: str, app: Flask) -> bool:
    """Return whether *rule* is meant for *path*, not only for any path of the same shape.

    Host and method are ignored, because the guard ignores them too.
    """
    if rule.build_only or rule.websocket:
        return False
    fixed, _, variable = rule.rule.partition("<")
    if not variable:
        return fixed.rstrip("/") == path.rstrip("/")
    if not path.startswith(fixed) and f"{path}/" != fixed:
        return False
    if rule.endpoint.rpartition(".")[2] == _STATIC:
        return _is_static_file(rule, path.removeprefix(fixed), app)
    converters = {name: _unconverted(each) for name, each in app.url_map.converters.items()}
    alone = Map([_without_host(rule)], converters=converters)
    # A rule that also matches a made-up name of the same shape is not meant for this path.
    folder = fixed[: fixed.rindex("/") + 1]
    name = "".join("q" if mark.isalnum() else mark for mark in path.removeprefix(folder))
    return _matches(alone, path) and not _matches(alone, folder + name)


def _is_static_file(rule: Rule, name: str, app: Flask) -> bool:
    owner = app.blueprints.get(rule.endpoint.rpartition(".")[0], app)
    found = safe_join(owner.static_folder or "", name) if owner.static_folder else None
    return found is not None and Path(found).is_file()


def _without_host(rule: Rule) -> Rule:
    alone = rule.empty()
    alone.host, alone.subdomain, alone.methods = None, "", None
    return alone


def _unconverted(converter: type[BaseConverter]) -> type[BaseConverter]:
    """Return *converter* without its ``to_python``, which may query a database, for example."""
    return type(converter.__name__, (converter,), {"to_python": lambda self, value: value})


def _matches(routes: Map, path: str) -> bool:
    try:
        routes.bind("").match(path)
    except RequestRedirect:
        return True
    except HTTPException:
        return False
    return True
