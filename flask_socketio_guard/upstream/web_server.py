"""Settings that the guard applies to the web server of a process when it starts to serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.component import Component, Watch
from .engineio.websocket import bound_silence, hold_answers, offer_compression

if TYPE_CHECKING:
    from flask_socketio import SocketIO

    from ..config import GuardConfig


class WebServer(Component):
    """Sets the timeout of HTTP connections, and how WebSocket handshakes are answered.

    Args:
        config: The settings.
        socketio: A ``SocketIO`` with an application; determines the path of Engine.IO.
    """

    def __init__(self, config: GuardConfig, socketio: SocketIO) -> None:
        self._config = config
        self._socketio = socketio

    def serve(self, watch: Watch) -> None:
        """Apply the settings to this process."""
        del watch
        path = self._socketio.sockio_mw.engineio_path
        bound_silence(self._config.http_timeout)
        hold_answers(path)
        if self._config.websocket_compression:
            offer_compression(path)
