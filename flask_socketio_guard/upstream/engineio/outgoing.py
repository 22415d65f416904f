"""One message to a client, in every form in which a transport may want it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engineio import packet as packets
from engineio.packet import Packet
from websockets.frames import Frame, Opcode

if TYPE_CHECKING:
    from collections.abc import Sequence

_MESSAGE = str(packets.MESSAGE)
_MAX_KNOWN_HEAD = 2048  # bytes of data
_OVERHEAD = 100  # bytes that a waiting message costs besides its text


class ClientMessage:
    """A Socket.IO packet with its attachments, or an Engine.IO packet.

    One object serves every recipient of a broadcast: each form is made once.

    Args:
        encoded: Engine.IO packets as they are on a WebSocket, in order.

    Attributes:
        frames: It as WebSocket frames. Source: Engine.IO protocol v4, text in text
            frames, binary data in binary frames.
        size: Bytes that it costs while it waits.
        is_event: Whether it may be dropped for a client that is slow.
        is_volatile: Whether it is worth nothing later.
        charge: What counts it for the event that has caused it, as long as it is there.
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
        """Make a message of an Engine.IO packet."""
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
        """Make a message of an encoded Socket.IO packet.

        Source:
            Engine.IO protocol v4: a message is its text behind a ``4``, or its bytes.
        """
        if isinstance(encoded, str):
            parts: Sequence[str | bytes] = (_MESSAGE + encoded,)
        elif isinstance(encoded, list):
            parts = [_MESSAGE + part if isinstance(part, str) else part for part in encoded]
        else:
            parts = (encoded,)
        return cls(parts, is_event=is_event, is_volatile=is_volatile, charge=charge)

    def plain(self) -> Sequence[str | bytes]:
        """Return what each frame would hold, for a WebSocket that makes its own frames."""
        return self._encoded

    def packets(self) -> list[Any]:
        """Return Engine.IO packets, new ones: each keeps the first form it is encoded to."""
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
    if len(body) > _MAX_KNOWN_HEAD:
        return Frame(opcode, body).serialize(mask=False)
    return _head(opcode, len(body)) + body


@lru_cache(maxsize=2 * (_MAX_KNOWN_HEAD + 1))
def _head(opcode: Opcode, size: int) -> bytes:
    """Return what stands before the data of a frame of *size* bytes."""
    frame = Frame(opcode, bytes(size)).serialize(mask=False)
    return frame[: len(frame) - size]
