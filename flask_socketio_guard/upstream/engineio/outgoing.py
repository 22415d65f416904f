"""One message to a client, in each encoding that a transport may need."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engineio import packet as packets
from engineio.packet import Packet
from websockets.frames import Frame, Opcode

if TYPE_CHECKING:
    from collections.abc import Sequence

_MESSAGE = str(packets.MESSAGE)
_MAX_CACHED_HEADER = 2048  # bytes of data; up to this size, frame headers are cached
_OVERHEAD = 100  # bytes that a queued message costs in addition to its frames


class ClientMessage:
    """A Socket.IO packet with its attachments, or an Engine.IO packet.

    One object serves every recipient of a broadcast, so each encoding is made once.

    Args:
        encoded: Engine.IO packets as sent over a WebSocket, in order.

    Attributes:
        frames: The message as WebSocket frames. Source: Engine.IO protocol v4, text in text
            frames, binary data in binary frames.
        size: Bytes that it costs while it is queued.
        is_event: Whether it may be dropped for a slow consumer.
        is_volatile: Whether it is useless unless it is sent immediately.
        charge: An object that counts this message against the event that caused it, for as
            long as the message exists.
    """

    __slots__ = ("_encoded", "charge", "frames", "is_event", "is_volatile", "size")

    def __init__(
        self,
        encoded: Sequence[str | bytes],
        *,
        is_event: bool = False,
        is_volatile: bool = False,
        charge: object = None,
    ) -> None:
        self._encoded = encoded
        self.charge = charge
        self.is_event = is_event
        self.is_volatile = is_volatile
        self.frames = _frame(encoded[0]) if len(encoded) == 1 else b"".join(map(_frame, encoded))
        self.size = len(self.frames) + _OVERHEAD

    @classmethod
    def of_engineio(cls, packet: Any) -> ClientMessage:
        """Make a message from an Engine.IO packet."""
        return cls([packet.encode()])

    @classmethod
    def of_socketio(
        cls,
        encoded: str | bytes | list[Any],
        *,
        is_event: bool = False,
        is_volatile: bool = False,
        charge: object = None,
    ) -> ClientMessage:
        """Make a message from an encoded Socket.IO packet.

        Source:
            Engine.IO protocol v4: a message packet is a ``4`` followed by the text, or the
            plain bytes.
        """
        if isinstance(encoded, str):
            parts: Sequence[str | bytes] = (_MESSAGE + encoded,)
        elif isinstance(encoded, list):
            parts = [_MESSAGE + part if isinstance(part, str) else part for part in encoded]
        else:
            parts = (encoded,)
        return cls(parts, is_event=is_event, is_volatile=is_volatile, charge=charge)

    def plain(self) -> Sequence[str | bytes]:
        """Return the data of each frame, for a WebSocket library that builds its own frames."""
        return self._encoded

    def packets(self) -> list[Any]:
        """Return new Engine.IO packets, since each packet caches its first encoding."""
        return [
            Packet(int(part[0]), part[1:])
            if isinstance(part, str)
            else Packet(packets.MESSAGE, part)
            for part in self._encoded
        ]


def _frame(data: str | bytes) -> bytes:
    opcode, body = (
        (Opcode.TEXT, data.encode()) if isinstance(data, str) else (Opcode.BINARY, bytes(data))
    )
    if len(body) > _MAX_CACHED_HEADER:
        return Frame(opcode, body).serialize(mask=False)
    return _header(opcode, len(body)) + body


@lru_cache(maxsize=2 * (_MAX_CACHED_HEADER + 1))
def _header(opcode: Opcode, size: int) -> bytes:
    """Return the header of a frame with *size* bytes of data."""
    frame = Frame(opcode, bytes(size)).serialize(mask=False)
    return frame[: len(frame) - size]
