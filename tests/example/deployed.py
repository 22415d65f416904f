"""Servers that are deployed as documented: everything comes from gunicorn's configuration."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tests.support import GunicornServer, free_port
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXAMPLE = "example_app.app:create_app()"
DEMO = "demo.app:create_app()"
CONFIG = str(PROJECT_ROOT / "gunicorn.conf.py")
INSTALLED_CONFIG = "python:flask_socketio_guard_gunicorn"


class DeployedServer(GunicornServer):
    """One gunicorn process with the project's configuration, and no setting beside it.

    Args:
        app: What gunicorn serves.
        env: Added to the environment of the processes; the configuration reads it.
        arguments: Further command line arguments for gunicorn.
        config: Names the configuration.
    """

    def __init__(
        self,
        app: str = EXAMPLE,
        *,
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        config: str = CONFIG,
    ) -> None:
        port = free_port()
        own = {"HOST": "127.0.0.1", "PORT": str(port)}
        super().__init__(app, port=port, env=own | dict(env or {}))
        self.name = str(port)
        self._command = [
            *(sys.executable, "-m", "gunicorn"),
            *("--config", config),
            *arguments,
            app,
        ]
