"""What a client must not send, and how it is told."""

from __future__ import annotations

from engineio.exceptions import EngineIOError
from websockets.frames import CloseCode


class ProtocolViolation(EngineIOError):
    """A client sent what the protocols do not allow.

    Attributes:
        reason: See :class:`~flask_socketio_guard.telemetry.records.Violation`.
        code: WebSocket close code that tells the client.
        text: WebSocket close reason.
    """

    code = CloseCode.PROTOCOL_ERROR
    text = "protocol error"

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:200]


class TooLarge(ProtocolViolation):
    """A client sent more than it may in one packet."""

    code = CloseCode.MESSAGE_TOO_BIG
    text = "too many lists and objects"


class TooManyJoins(ProtocolViolation):
    """A client sent CONNECT packets without end."""

    code = CloseCode.POLICY_VIOLATION
    text = "too many connects"
