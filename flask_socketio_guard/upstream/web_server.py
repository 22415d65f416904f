"""What the web server of a process is asked for, once it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.component import Component, Watch
from .engineio.websocket import bound_silence, hold_answers, offer_compression

if TYPE_CHECKING:
    from flask_socketio import SocketIO

    from ..config import GuardConfig


class WebServer(Component):
    """Bounds of silent connections, and how requests for WebSockets are answered.

    Args:
        config: Settings.
        socketio: Knows below which path Engine.IO is served.
    """

    def __init__(self, config: GuardConfig, socketio: SocketIO) -> None:
        self._config = config
        self._socketio = socketio

    def serve(self, watch: Watch) -> None:
        """Ask for it."""
        del watch
        path = self._socketio.sockio_mw.engineio_path
        bound_silence(self._config.http_timeout)
        hold_answers(path)
        if self._config.websocket_compression:
            offer_compression(path)
