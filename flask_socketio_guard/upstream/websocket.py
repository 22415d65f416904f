"""Refusing a WebSocket that gevent-websocket has accepted already."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

from geventwebsocket.exceptions import WebSocketError

_TRY_AGAIN_LATER = 1013  # IANA WebSocket close code registry


def refuse_websocket(websocket: Any, reason: str) -> None:
    """Close *websocket* with "try again later".

    gevent-websocket's own ``close`` takes a code and leaves it out of the frame.

    Args:
        websocket: ``environ["wsgi.websocket"]``.
        reason: At most 123 bytes; the client sees it.

    Source:
        RFC 6455, section 5.5.1: a close frame's body begins with the code, two
        bytes in network order.
    """
    body = struct.pack("!H", _TRY_AGAIN_LATER) + reason.encode()
    with contextlib.suppress(WebSocketError):
        websocket.send_frame(body, websocket.OPCODE_CLOSE)
    websocket.closed = True  # the handler would send a second close frame
