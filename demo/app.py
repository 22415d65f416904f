"""The application that each process of the demo serves: the example with the "Break it" panel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo import panel
from example_app.app import create_app as create_exchange
from example_app.app import guard, socketio

if TYPE_CHECKING:
    from flask import Flask


def create_app() -> Flask:
    """Create the example application, and add the panel to it."""
    app = create_exchange()
    panel.init_app(app, socketio, guard)
    return app
