"""What browsers load from the application to go with the guard."""

from __future__ import annotations

from flask import Blueprint

SCRIPTS = "socketio_guard"
"""Name of the blueprint."""

_HOUR = 3600


def blueprint(path: str) -> Blueprint:
    """Return a blueprint that serves ``deliveries.js`` below *path*."""
    scripts = Blueprint(SCRIPTS, __name__, static_folder="static", static_url_path=path)
    scripts.get_send_file_max_age = lambda filename: _HOUR  # type: ignore[method-assign]
    return scripts
