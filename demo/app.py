"""The Harbour Exchange with the "Break it" panel: what each process of the demo serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo import panel
from example_app.app import create_app as create_exchange
from example_app.app import guard, socketio

if TYPE_CHECKING:
    from flask import Flask


def create_app() -> Flask:
    """Create the example application, and plug the panel into it."""
    app = create_exchange()
    panel.init_app(app, socketio, guard)
    return app
