"""A Socket.IO client that costs the load generator as little as possible.

It speaks just what the measurements need: Engine.IO 4 over a WebSocket, the namespace ``/``, text
frames. Parsing is written out by hand because a general WebSocket library would cost as much per
message as the server under measurement.

Source:
    RFC 6455, section 5.2 (frames); Engine.IO protocol 4; Socket.IO protocol 5.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = 60.0

_TEXT = 0x81  # FIN and opcode 1
_CLOSE = 0x88
_PING = 0x89
_PONG = 0x8A

_HANDSHAKE = (
    b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class WrongAnswerError(Exception):
    """An event was lost, doubled, out of order or not what it should be."""


class Client(asyncio.Protocol):
    """One connection; made by :func:`connect`.

    Attributes:
        on_event: Called with each event packet, from its ``42`` on.
        on_ack: Called with each acknowledgement packet, from its ``43`` on, that answers no
            :meth:`call`.
        failure: Set to an exception when the connection is lost or breaks the protocol, unless
            :meth:`close` asked for it.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.on_event: Callable[[bytes], None] = _ignore
        self.on_ack: Callable[[bytes], None] = _ignore
        self.failure: asyncio.Future[None] = loop.create_future()
        self.opened: asyncio.Future[None] = loop.create_future()
        self._calls: dict[bytes, asyncio.Future[Any]] = {}
        self._call_count = 0
        self._buffer = b""
        self._is_upgraded = False
        self._is_closing = False
        self._mask = os.urandom(4)
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the WebSocket."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(_HANDSHAKE)

    def connection_lost(self, exc: Exception | None) -> None:
        """Report it, unless it was asked for."""
        self._fail(f"connection lost: {exc}")

    def data_received(self, data: bytes) -> None:
        """Take the frames out of *data*; a wrong answer ends the connection."""
        try:
            self._take_frames(data)
        except WrongAnswerError as exc:
            self._fail(str(exc))

    def _take_frames(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        if not self._is_upgraded:
            head, separator, rest = data.partition(b"\r\n\r\n")
            if not separator:
                self._buffer = data
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._fail(f"no WebSocket: {head[:200]!r}")
                return
            self._is_upgraded = True
            data = rest
        position = 0
        size = len(data)
        while size - position >= 2:
            first = data[position]
            length = data[position + 1]
            start = position + 2
            if length == 126:
                length = int.from_bytes(data[start : start + 2], "big")
                start += 2
            elif length == 127:
                length = int.from_bytes(data[start : start + 8], "big")
                start += 8
            end = start + length
            if end > size:  # also when the length itself is incomplete: then end >= start > size
                break
            self._receive(first, data[start:end])
            position = end
        self._buffer = data[position:]

    def _receive(self, first: int, payload: bytes) -> None:
        """Handle one frame."""
        if first == _TEXT:
            kind = payload[:2]
            if kind == b"42":
                self.on_event(payload)
            elif kind == b"43":
                self._acknowledge(payload)
            elif payload == b"2":
                self.send(b"3")
            elif kind[:1] == b"0":
                self.send(b"40")
            elif kind == b"40":
                self.opened.set_result(None)
            else:
                self._fail(f"unexpected packet {payload[:200]!r}")
        elif first == _PING:
            self._write(_PONG, payload)
        elif first == _CLOSE:
            self._fail("closed by the server")
        else:
            self._fail(f"unexpected frame {first:#x}")

    def _acknowledge(self, payload: bytes) -> None:
        if self._calls:
            end = payload.index(b"[")
            waiting = self._calls.pop(payload[2:end], None)
            if waiting is not None:
                waiting.set_result(json.loads(payload[end:])[0])
                return
        self.on_ack(payload)

    def send(self, packet: bytes) -> None:
        """Send one Engine.IO packet as a text frame."""
        self._write(_TEXT, packet)

    def _write(self, first: int, payload: bytes) -> None:
        length = len(payload)
        if length < 126:
            head = bytes((first, 0x80 | length))
        elif length < 65536:
            head = bytes((first, 0x80 | 126)) + length.to_bytes(2, "big")
        else:
            head = bytes((first, 0x80 | 127)) + length.to_bytes(8, "big")
        key = (self._mask * (length // 4 + 1))[:length]
        masked = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
        self._transport.write(head + self._mask + masked.to_bytes(length, "big"))

    def emit(self, event: str, *args: Any) -> None:
        """Send an event that wants no acknowledgement."""
        self.send(b"42" + json.dumps([event, *args]).encode())

    async def call(self, event: str, *args: Any) -> Any:
        """Send an event and return the first argument of its acknowledgement."""
        self._call_count += 1
        number = b"9%09d" % self._call_count  # apart from the numbers that measurements use
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        self.send(b"42" + number + json.dumps([event, *args]).encode())
        await wait_for(answer, [self])
        return answer.result()

    def close(self) -> None:
        """Leave."""
        self._is_closing = True
        self._write(_CLOSE, b"\x03\xe8")
        self._transport.close()

    def _fail(self, why: str) -> None:
        if not self._is_closing and not self.failure.done():
            self.failure.set_exception(WrongAnswerError(why))
            self.failure.exception()  # it is also raised where somebody waits; never report twice
            self._transport.close()


def _ignore(packet: bytes) -> None:
    raise WrongAnswerError(f"nobody waits for {packet[:200]!r}")


async def connect(port: int, count: int) -> list[Client]:
    """Connect *count* clients to the server on *port*, twenty at a time."""
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    while len(clients) < count:
        some = min(20, count - len(clients))
        opening = [loop.create_connection(Client, "127.0.0.1", port) for _ in range(some)]
        batch = [client for _, client in await asyncio.gather(*opening)]
        for client in batch:
            await wait_for(client.opened, [client])
        clients += batch
    return clients


async def wait_for(done: asyncio.Future[Any], clients: list[Client]) -> None:
    """Return when *done* is.

    Raises:
        WrongAnswerError: One of *clients* failed first, or *done* took longer than 60 s.
    """
    failures = {client.failure for client in clients}
    await asyncio.wait({done, *failures}, timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
    for failure in failures:
        if failure.done():
            failure.result()
    if not done.done():
        raise WrongAnswerError(f"answers are missing after {TIMEOUT:.0f} s")
    done.result()
