"""What browsers load from the application to go with the guard."""

from __future__ import annotations

from pathlib import Path

from flask import Blueprint, Flask, Response, send_from_directory

from .errors import ConfigError

SCRIPTS = "socketio_guard"
"""Name of the blueprint."""

SCRIPT_FILE = "deliveries.js"
_FOLDER = Path(__file__).with_name("static")
_HOUR = 3600


def serve_scripts(app: Flask, path: str) -> None:
    """Serve ``deliveries.js`` below *path*, and nothing else there.

    Raises:
        ConfigError: The application has a blueprint of the same name.
    """
    known = app.blueprints.get(SCRIPTS)
    if known is None:
        app.register_blueprint(_blueprint(path))
    elif known.import_name != __name__:  # the guard's own is there if *app* is guarded anew
        raise ConfigError(
            f"the application has a blueprint {SCRIPTS!r}, which is the name of the guard's: "
            "rename it, or set SOCKETIO_GUARD_SCRIPTS_PATH to None"
        )


def _blueprint(path: str) -> Blueprint:
    # Without a static folder of its own, which would have a route beside the application's.
    scripts = Blueprint(SCRIPTS, __name__)

    def script(filename: str) -> Response:
        return send_from_directory(_FOLDER, filename, max_age=_HOUR)

    # Not all that is below *path*: a catch-all route of the application goes on to serve that.
    rule = f"{path}/<any({SCRIPT_FILE!r}):filename>"
    scripts.add_url_rule(rule, endpoint="static", view_func=script)
    return scripts
