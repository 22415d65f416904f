"""One raw connection to a server, which speaks HTTP and then WebSocket, right or wrong.

It has no thread of its own and does nothing by itself: nothing is read or answered unless a test
asks for it. So a test decides at which byte of a conversation it stops, goes or breaks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tests.support.waiting import USUAL_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from typing_extensions import Self

    Headers = Mapping[str, str | None]

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
NO_MASK = b"\0\0\0\0"
"""A mask that leaves the payload as it is: large frames cost their sender nothing."""
SEPARATOR = "\x1e"
"""Between the packets of one polling payload (Engine.IO protocol 4)."""
TIMEOUT = USUAL_TIMEOUT

_CHUNK = 65_536
_FIN, _MASKED = 0x80, 0x80
_UPGRADE_HEADERS = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


@dataclass(frozen=True)
class Answer:
    """The answer to one HTTP request; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode(errors="replace")

    @property
    def packets(self) -> list[str]:
        """The Engine.IO packets of a polling answer."""
        return self.text.split(SEPARATOR) if self.body else []


class Frame(NamedTuple):
    """One frame that was received."""

    opcode: int
    payload: bytes

    @property
    def text(self) -> str:
        """The payload as text."""
        return self.payload.decode()


@dataclass(frozen=True)
class Farewell:
    """How the server ended a WebSocket, and when (monotonic, seconds).

    Attributes:
        code: Of its close frame; ``None`` where the connection ended without one.
        reason: Of its close frame.
        at: When the close frame, or without one the end of the connection, was there.
    """

    code: int | None
    reason: str
    at: float


def target(transport: str, *, session: str | None = None, query: str = "") -> str:
    """Return the address of an Engine.IO request."""
    parts = ["EIO=4", f"transport={transport}", f"sid={session}" if session else "", query]
    return f"/socket.io/?{'&'.join(filter(None, parts))}"


def request_bytes(
    method: str,
    address: str,
    *,
    headers: Headers | None = None,
    body: bytes = b"",
    protocol: str = "HTTP/1.1",
) -> bytes:
    """Return one HTTP request as it goes over the wire; headers that are ``None`` are left out."""
    wanted: dict[str, str | None] = {"Host": "127.0.0.1", **(headers or {})}
    if body or method == "POST":
        wanted["Content-Length"] = str(len(body))
    lines = [f"{name}: {value}" for name, value in wanted.items() if value is not None]
    head = "\r\n".join([f"{method} {address} {protocol}", *lines, "", ""])
    return head.encode("latin-1") + body


def upgrade_bytes(
    address: str, *, headers: Headers | None = None, protocol: str = "HTTP/1.1"
) -> bytes:
    """Return the request for a WebSocket; *headers* replace, or with ``None`` remove, its own."""
    return request_bytes(
        "GET", address, headers={**_UPGRADE_HEADERS, **(headers or {})}, protocol=protocol
    )


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


def close_frame(code: int | None) -> bytes:
    """Return a close frame with that status code, or without one."""
    return encode_frame(CLOSE, b"" if code is None else struct.pack("!H", code))


class RawConnection:
    """One TCP connection to a port on the loopback interface.

    Args:
        port: Where the server listens.
        timeout: Longest wait of every method, in seconds.
        receive_buffer: Size of the kernel's buffer for what is received, in bytes; the system's
            default if ``None``. A small one makes the server feel early that nobody reads.
    """

    def __init__(
        self, port: int, *, timeout: float = TIMEOUT, receive_buffer: int | None = None
    ) -> None:
        self.port = port
        self.timeout = timeout
        self.farewell: Farewell | None = None
        """How the server ended the WebSocket, once that was read."""
        self._receive_buffer = receive_buffer
        self._socket: socket.socket | None = None
        self._buffer = bytearray()

    @property
    def sock(self) -> socket.socket:
        """The socket.

        Raises:
            ConnectionError: It was not dialled, or is shut.
        """
        if self._socket is None:
            raise ConnectionError("this connection is not open")
        return self._socket

    def dial(self) -> Self:
        """Connect, unless that is done."""
        if self._socket is None:
            self._socket = dialled = socket.socket()
            if self._receive_buffer is not None:
                dialled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
            dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            dialled.settimeout(self.timeout)
            dialled.connect(("127.0.0.1", self.port))
        return self

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.settimeout(self.timeout)
        self.sock.sendall(data)

    def read_answer(self) -> Answer:
        """Read one HTTP answer.

        Raises:
            ConnectionError: The server closed the connection before it was whole.
        """
        status, *lines = self._take_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        code = int(status.split()[1])
        return Answer(code, headers, b"" if code == 101 else self._read_body(headers))

    def receive_frame(self, timeout: float | None = None) -> Frame | None:
        """Return the next frame, or ``None`` when the connection has ended.

        Raises:
            TimeoutError: Nothing came in time.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while (frame := self._parse_frame()) is None:
            if not self._receive(deadline):
                self.farewell = self.farewell or Farewell(None, "", time.monotonic())
                return None
        if frame.opcode == CLOSE:
            code = struct.unpack("!H", frame.payload[:2])[0] if len(frame.payload) >= 2 else None
            reason = frame.payload[2:].decode(errors="replace")
            self.farewell = Farewell(code, reason, time.monotonic())
        return frame

    def hang_up(self) -> None:
        """End the connection with a FIN, also for another thread that reads or writes."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def shut(self) -> None:
        """End the connection with a FIN and no other good-bye; once more does nothing."""
        if self._socket is not None:
            self.hang_up()
            self._socket.close()
            self._socket = None

    def reset(self) -> None:
        """End the connection with a RST, as a process that crashes with unread data does."""
        if self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        """Return the connection; nothing is dialled yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the connection."""
        self.shut()

    def _receive(self, deadline: float) -> bool:
        """Add to the buffer; return whether the connection goes on."""
        sock = self.sock
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.0))
            received = sock.recv(_CHUNK)
        except BlockingIOError:
            raise TimeoutError("timed out") from None
        except ConnectionError:
            received = b""
        self._buffer += received
        return bool(received)

    def _fill(self) -> None:
        if not self._receive(time.monotonic() + self.timeout):
            raise ConnectionError("the server closed the connection")

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _take_until(self, end: bytes) -> bytes:
        """Take what comes before *end*, and *end* itself, which is not returned."""
        while end not in self._buffer:
            self._fill()
        return self._take(self._buffer.index(end) + len(end))[: -len(end)]

    def _read_body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return b"".join(self._read_chunks())
        if "content-length" in headers:
            return self._take(int(headers["content-length"]))
        with contextlib.suppress(ConnectionError):
            while True:
                self._fill()
        return self._take(len(self._buffer))

    def _read_chunks(self) -> Iterator[bytes]:
        while size := int(self._take_until(b"\r\n"), 16):
            yield self._take(size + 2)[:-2]
        self._take(2)

    def _parse_frame(self) -> Frame | None:
        """Take the first frame from the buffer; servers do not mask."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        size, start = buffer[1] & 0x7F, 2
        if size >= 126:
            start = 4 if size == 126 else 10
            if len(buffer) < start:
                return None
            size = int.from_bytes(buffer[2:start], "big")
        if len(buffer) < start + size:
            return None
        frame = Frame(buffer[0] & 0x0F, bytes(buffer[start : start + size]))
        del buffer[: start + size]
        return frame


def _masked(payload: bytes, mask: bytes) -> bytes:
    key = (mask * (len(payload) // 4 + 1))[: len(payload)]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return number.to_bytes(len(payload), "big")
