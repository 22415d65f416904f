"""One message to a client, in every form in which a transport may want it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engineio.packet import Packet
from engineio.packet import packet_names as _packet_names
from websockets.frames import Frame, Opcode

if TYPE_CHECKING:
    from collections.abc import Sequence

_MESSAGE = _packet_names.index("MESSAGE")
_OVERHEAD = 100  # bytes that a waiting message costs besides its text


class Message:
    """A Socket.IO packet with its attachments, or an Engine.IO packet.

    One object serves every recipient of a broadcast: each form is made once.

    Attributes:
        packets: The Engine.IO packets, in order.
        is_event: Whether it may be dropped for a client that is slow.
        is_volatile: Whether it is worth nothing later.
    """

    __slots__ = ("_frames", "is_event", "is_volatile", "packets")

    def __init__(
        self, packets: Sequence[Any], *, is_event: bool = False, is_volatile: bool = False
    ) -> None:
        self.packets = packets
        self.is_event = is_event
        self.is_volatile = is_volatile
        self._frames: bytes | None = None

    @classmethod
    def of_socketio(
        cls, encoded: str | bytes | list[Any], *, is_event: bool = False, is_volatile: bool = False
    ) -> Message:
        """Make a message of an encoded Socket.IO packet."""
        parts = encoded if isinstance(encoded, list) else (encoded,)
        return cls(
            [Packet(_MESSAGE, part) for part in parts], is_event=is_event, is_volatile=is_volatile
        )

    @property
    def size(self) -> int:
        """Bytes that it costs while it waits."""
        return len(self.frames()) + _OVERHEAD

    def frames(self) -> bytes:
        """Return it as WebSocket frames.

        Source:
            Engine.IO protocol v4: text in text frames, binary data in binary frames.
        """
        if self._frames is None:
            encoded = [_frame(packet.encode()) for packet in self.packets]
            self._frames = encoded[0] if len(encoded) == 1 else b"".join(encoded)
        return self._frames

    def plain(self) -> list[str | bytes]:
        """Return what each frame would hold, for a WebSocket that makes its own frames."""
        return [packet.encode() for packet in self.packets]

    def polled(self) -> list[Any]:
        """Return Engine.IO packets for the answer to a polling request.

        New ones for binary data: a packet keeps the first form it is encoded to,
        and base64 would then reach clients over WebSocket too.
        """
        return [
            Packet(packet.packet_type, packet.data) if packet.binary else packet
            for packet in self.packets
        ]


def _frame(data: str | bytes) -> bytes:
    if isinstance(data, str):
        return Frame(Opcode.TEXT, data.encode()).serialize(mask=False)
    return Frame(Opcode.BINARY, data).serialize(mask=False)
