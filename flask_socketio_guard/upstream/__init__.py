"""The only code that touches private parts of the Socket.IO packages.

An application's own ``SocketIO``, ``Server`` and client manager keep their identity: the class of
each is replaced by a guarded subclass. They reach the rest of the guard only through
:class:`~flask_socketio_guard.ports.Ports`.
"""

from __future__ import annotations

from .adopt import (
    adopt,
    close_for_restart,
    forsake_clients,
    given_back_on_failure,
    has_queue,
    new_host_id,
    transport_of,
)
from .compat import check_versions
from .engineio.session_ids import is_session_id
from .flask.socketio_object import is_socketio, take_lost_handlers
from .socketio.encoding import encode_strict
from .socketio.local_clients import LocalClients
from .socketio.sweeper import Sweeper
from .web_server import WebServer

__all__ = [
    "LocalClients",
    "Sweeper",
    "WebServer",
    "adopt",
    "check_versions",
    "close_for_restart",
    "encode_strict",
    "forsake_clients",
    "given_back_on_failure",
    "has_queue",
    "is_session_id",
    "is_socketio",
    "new_host_id",
    "take_lost_handlers",
    "transport_of",
]
