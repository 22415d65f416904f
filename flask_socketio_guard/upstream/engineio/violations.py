"""Protocol violations, and the WebSocket close code and reason that report each to the client."""

from __future__ import annotations

from engineio.exceptions import EngineIOError
from websockets.frames import CloseCode


class ProtocolViolation(EngineIOError):
    """A client sent something that the Engine.IO or Socket.IO protocol does not allow.

    Attributes:
        reason: See :class:`~flask_socketio_guard.telemetry.records.Violation`.
        code: WebSocket close code sent to the client.
        text: WebSocket close reason sent to the client.
    """

    code = CloseCode.PROTOCOL_ERROR
    text = "protocol error"

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:200]


class TooLarge(ProtocolViolation):
    """A client sent a packet with more lists and objects than are allowed."""

    code = CloseCode.MESSAGE_TOO_BIG
    text = "too many lists and objects"


class TooManyJoins(ProtocolViolation):
    """A client sent more CONNECT packets than its rate limit allows."""

    code = CloseCode.POLICY_VIOLATION
    text = "too many connects"
