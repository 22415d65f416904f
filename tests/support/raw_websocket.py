"""A WebSocket client that says exactly what it is told to, right or wrong.

It sits on a plain socket and has no thread of its own: nothing is read, and no ping is answered,
unless a test asks for it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
NO_MASK = b"\0\0\0\0"
"""A mask that leaves the payload as it is: large frames cost their sender nothing."""

_DEFAULT_TIMEOUT = 5.0
_CHUNK = 65536
_FIN, _MASKED = 0x80, 0x80


class HandshakeRefused(AssertionError):
    """The server answered a WebSocket handshake with something other than 101."""

    def __init__(self, status: int, head: str) -> None:
        super().__init__(f"the WebSocket handshake was answered with {status}")
        self.status = status
        self.head = head


@dataclass(frozen=True)
class Frame:
    """One frame that was received."""

    opcode: int
    payload: bytes
    is_final: bool = True

    @property
    def text(self) -> str:
        """The payload as text."""
        return self.payload.decode()

    @property
    def close_code(self) -> int | None:
        """The status code of a close frame, if it has one."""
        return struct.unpack("!H", self.payload[:2])[0] if len(self.payload) >= 2 else None

    @property
    def close_reason(self) -> str:
        """The reason in a close frame."""
        return self.payload[2:].decode()


def encode_frame(
    opcode: int,
    payload: bytes = b"",
    *,
    is_final: bool = True,
    reserved: int = 0,
    mask: bytes | None = NO_MASK,
    length: int | None = None,
) -> bytes:
    """Return one frame.

    Args:
        opcode: 0 to 15.
        payload: Unmasked.
        is_final: The FIN bit.
        reserved: The bits RSV1 (4), RSV2 (2) and RSV3 (1).
        mask: Four bytes, or ``None`` for an unmasked frame.
        length: What the header says of the length, if not the truth.

    Source:
        RFC 6455, section 5.2.
    """
    size = len(payload) if length is None else length
    first = (_FIN if is_final else 0) | reserved << 4 | opcode
    bit = 0 if mask is None else _MASKED
    if size < 126:
        header = struct.pack("!BB", first, bit | size)
    elif size < 1 << 16:
        header = struct.pack("!BBH", first, bit | 126, size)
    else:
        header = struct.pack("!BBQ", first, bit | 127, size)
    if mask is None:
        return header + payload
    return header + mask + (payload if mask == NO_MASK else _masked(payload, mask))


def text_frame(text: str) -> bytes:
    """Return *text* as one masked frame."""
    return encode_frame(TEXT, text.encode(), mask=os.urandom(4))


class RawWebSocket:
    """One WebSocket to the Socket.IO server at *url* (``http://host:port``).

    Args:
        url: Of the server.
        query: Added to the query string.
        receive_buffer: Size of the kernel's buffer for what is received, in bytes; the system's
            default if ``None``. For clients that do not read.
        timeout: Longest wait of every method, in seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        query: str = "",
        receive_buffer: int | None = None,
        timeout: float = _DEFAULT_TIMEOUT,
    ) -> None:
        address = urlsplit(url)
        self._host = f"{address.hostname}:{address.port}"
        self._path = f"/socket.io/?EIO=4&transport=websocket{'&' if query else ''}{query}"
        self._address = (address.hostname, address.port)
        self._receive_buffer = receive_buffer
        self._timeout = timeout
        self._buffer = bytearray()
        self.sock = socket.socket()
        self.eio_sid = ""
        self.sid = ""
        self.close: Frame | None = None
        """The close frame of the server, once it was read."""
        self.has_ended = False
        """Whether the server has ended the TCP connection, as far as was read."""

    def open(self, headers: dict[str, str] | None = None) -> None:
        """Connect and shake hands; the server's first Engine.IO packet is read too.

        Args:
            headers: Replace or add to those of the request.

        Raises:
            HandshakeRefused: The answer is not 101.
        """
        self.shake_hands(headers)
        frame = self.read_frame()
        assert frame is not None, "the server sent no OPEN packet"
        assert frame.text.startswith("0{"), f"the server began with {frame.text!r}"
        self.eio_sid = json.loads(frame.text[1:])["sid"]

    def shake_hands(self, headers: dict[str, str] | None = None) -> None:
        """Connect and shake hands; read nothing more.

        Raises:
            HandshakeRefused: The answer is not 101.
        """
        if self._receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        self.sock.settimeout(self._timeout)
        self.sock.connect(self._address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fields = {
            "Host": self._host,
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Sec-WebSocket-Version": "13",
            **(headers or {}),
        }
        lines = [f"GET {self._path} HTTP/1.1", *(f"{key}: {fields[key]}" for key in fields)]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())
        while b"\r\n\r\n" not in self._buffer:
            if not self._receive():
                raise HandshakeRefused(0, self._buffer.decode(errors="replace"))
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        self._buffer[:] = rest
        status = int(head.split(maxsplit=2)[1])
        if status != 101:
            raise HandshakeRefused(status, head.decode(errors="replace"))

    def join(self, namespace: str = "/") -> None:
        """Open the connection and join *namespace*."""
        self.open()
        prefix = "40" if namespace == "/" else f"40{namespace},"
        self.send_text(prefix)
        self.sid = json.loads(self.read_text(prefix)[len(prefix) :])["sid"]

    def send(self, frames: bytes) -> None:
        """Send bytes as they are; see :func:`encode_frame`."""
        self.sock.sendall(frames)

    def send_text(self, text: str) -> None:
        """Send one text frame."""
        self.send(text_frame(text))

    def emit(self, event: str, *args: Any, ack_id: int | None = None) -> None:
        """Send an event in the namespace ``/``."""
        number = "" if ack_id is None else str(ack_id)
        self.send_text(f"42{number}{json.dumps([event, *args])}")

    def call(self, event: str, *args: Any, ack_id: int) -> list[Any]:
        """Send an event and return the arguments of its acknowledgement."""
        self.emit(event, *args, ack_id=ack_id)
        return self.read_ack(ack_id)

    def read_ack(self, ack_id: int) -> list[Any]:
        """Return the arguments of the acknowledgement with that number; skip what comes before."""
        prefix = f"43{ack_id}["
        answer: list[Any] = json.loads(self.read_text(prefix)[len(prefix) - 1 :])
        return answer

    def read_text(self, prefix: str) -> str:
        """Return the next text that begins with *prefix*; skip everything else."""
        wanted = prefix.encode()
        while True:
            frame = self.read_frame()
            assert frame is not None, f"the server closed, and no {prefix!r} had come"
            if frame.payload.startswith(wanted):
                return frame.text

    def read_frame(self, timeout: float | None = None) -> Frame | None:
        """Return the next frame, or ``None`` when the connection has ended.

        Engine.IO pings are answered and skipped.

        Raises:
            TimeoutError: Nothing came in time.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        while True:
            frame = self._parse()
            if frame is None:
                self.sock.settimeout(max(deadline - time.monotonic(), 0.001))
                if not self._receive():
                    return None
            elif frame.payload == b"2" and frame.opcode == TEXT:
                with contextlib.suppress(OSError):
                    self.send_text("3")
            else:
                if frame.opcode == CLOSE:
                    self.close = frame
                return frame

    def read_to_end(self, timeout: float | None = None) -> list[Frame]:
        """Return all frames up to the end of the connection.

        Raises:
            TimeoutError: It has not ended in time.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        frames: list[Frame] = []
        while True:
            frame = self.read_frame(max(deadline - time.monotonic(), 0.0))
            if frame is None:
                return frames
            frames.append(frame)

    def end(self) -> None:
        """Close the socket; calling it again does nothing."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def __enter__(self) -> Self:
        """Return the client; nothing is opened yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the socket."""
        self.end()

    def _receive(self) -> bool:
        try:
            received = self.sock.recv(_CHUNK)
        except (ConnectionResetError, BrokenPipeError):
            received = b""
        self.has_ended = self.has_ended or not received
        self._buffer += received
        return bool(received)

    def _parse(self) -> Frame | None:
        """Take the first frame from the buffer; servers do not mask."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        size, start = buffer[1] & 0x7F, 2
        if size == 126:
            size, start = int.from_bytes(buffer[2:4], "big"), 4
        elif size == 127:
            size, start = int.from_bytes(buffer[2:10], "big"), 10
        if len(buffer) < start + size:
            return None
        frame = Frame(buffer[0] & 0x0F, bytes(buffer[start : start + size]), bool(buffer[0] & _FIN))
        del buffer[: start + size]
        return frame


def _masked(payload: bytes, mask: bytes) -> bytes:
    key = (mask * (len(payload) // 4 + 1))[: len(payload)]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return number.to_bytes(len(payload), "big")
