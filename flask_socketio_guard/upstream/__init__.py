"""The one place that touches private parts of the Socket.IO packages.

An application's own ``SocketIO``, ``Server`` and client manager stay the objects
they are; each is given a guarded subclass of its own class. What they ask of the
rest of the guard goes through :class:`~flask_socketio_guard.hooks.Hooks`.
"""

from __future__ import annotations

from .adopt import adopt, new_host_id, transport_of
from .compat import check_versions
from .websocket import refuse_websocket

__all__ = ["adopt", "check_versions", "new_host_id", "refuse_websocket", "transport_of"]
