"""Socket.IO clients that cost the load generator as little as possible.

They implement only what the measurements need: Engine.IO 4 over a WebSocket, the namespace ``/``,
text frames. A general WebSocket library would cost as much per message as the server under
measurement. Here the frames to send are built and masked in advance, and received bytes are
compared with the expected ones; only other bytes are parsed.

Source:
    RFC 6455, section 5.2 (frames); Engine.IO protocol 4; Socket.IO protocol 5.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = 60.0

_TEXT = 0x81  # FIN and opcode 1
_CLOSE = 0x88
_PING = 0x89
_PONG = 0x8A
_CHUNK = 64 * 1024
_READABLE = select.EPOLLIN
_SEND_BUFFER = 1024 * 1024  # holds the largest frame, so that one call sends it

_HANDSHAKE = (
    b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
_MASK = os.urandom(4)


class WrongAnswerError(Exception):
    """An event was lost, duplicated, reordered or altered."""


def request_frame(packet: bytes) -> bytes:
    """Return the text frame in which a client sends *packet*."""
    return client_frame(_TEXT, packet)


def reply_frame(packet: bytes) -> bytes:
    """Return the text frame in which a server sends *packet*."""
    return _head(_TEXT, len(packet), 0) + packet


def client_frame(first: int, payload: bytes) -> bytes:
    """Return the frame in which a client sends *payload*; *first* is FIN, RSV and opcode."""
    length = len(payload)
    key = (_MASK * (length // 4 + 1))[:length]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return _head(first, length, 0x80) + _MASK + masked.to_bytes(length, "big")


def _head(first: int, length: int, mask_bit: int) -> bytes:
    if length < 126:
        return bytes((first, mask_bit | length))
    if length < 65536:
        return bytes((first, mask_bit | 126)) + length.to_bytes(2, "big")
    return bytes((first, mask_bit | 127)) + length.to_bytes(8, "big")


class Loop:
    """Serves all clients of the load generator from one ``epoll``."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._clients: dict[int, Client] = {}
        self._is_stopped = False

    def run(self) -> None:
        """Serve the clients until :meth:`stop`.

        Raises:
            WrongAnswerError: A client was cut off or got what it should not, or this took longer
                than 60 s.
        """
        self._is_stopped = False
        give_up_at = time.monotonic() + TIMEOUT
        clients = self._clients
        poll = self._poll.poll
        while not self._is_stopped:
            for descriptor, events in poll(1.0):
                client = clients.get(descriptor)
                if client is not None:  # the one before it may have ended it
                    client.ready(events)
            if time.monotonic() > give_up_at:
                raise WrongAnswerError(f"answers are missing after {TIMEOUT:.0f} s")

    def stop(self) -> None:
        """Make :meth:`run` return once the clients that are ready now have been served."""
        self._is_stopped = True

    def rest(self, seconds: float) -> None:
        """Serve the clients for *seconds*, in which nothing but pings should arrive."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for descriptor, events in self._poll.poll(left):
                client = self._clients.get(descriptor)
                if client is not None:
                    client.ready(events)

    def add(self, client: Client, descriptor: int) -> None:
        """Serve *client*."""
        self._clients[descriptor] = client
        self._poll.register(descriptor, select.EPOLLIN)

    def want_write(self, descriptor: int, is_wanted: bool) -> None:
        """Start or stop waiting until a client can send more."""
        self._poll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if is_wanted else 0))

    def remove(self, descriptor: int) -> None:
        """Stop serving the client; to be called before its socket is closed."""
        del self._clients[descriptor]
        self._poll.unregister(descriptor)


class Client:
    """One connection; starts the handshake at once, and sets :attr:`is_open` when it is done.

    Attributes:
        on_data: Called with bytes as received, and with each whole frame that arrived in pieces;
            returns whether they were the expected ones. If not, they are parsed.
        on_event: Called with each event packet, from its ``42`` on, that :attr:`on_data` did not
            accept.
        on_open: Called when the namespace is joined.
        on_closed: Called when the server has agreed to :meth:`leave`.
        is_open: Whether the namespace is joined.
    """

    def __init__(self, loop: Loop, port: int) -> None:
        self.on_data: Callable[[bytes], bool] = _expect_nothing
        self.on_event: Callable[[bytes], None] = _refuse
        self.on_open: Callable[[Client], None] = _do_nothing
        self.on_closed: Callable[[Client], None] = _do_nothing
        self.is_open = False
        self._loop = loop
        self._is_upgraded = False
        self._is_leaving = False
        self._call_count = 0
        self._call_number = b""
        self._answer: Any = None
        self._pieces: list[bytes] = []  # of an incomplete frame
        self._missing = 0  # bytes to receive before the pieces are checked again
        self._unsent = b""
        self._sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._descriptor = self._sock.fileno()
        self._recv = self._sock.recv
        loop.add(self, self._descriptor)
        self.send_frame(_HANDSHAKE)

    def ready(self, events: int) -> None:
        """Read or write as *events* of ``epoll`` allow."""
        if events != _READABLE:
            if events & select.EPOLLOUT:
                self._send_rest()
            if not events & ~select.EPOLLOUT:
                return
        try:
            data = self._recv(_CHUNK)
        except BlockingIOError:  # the event was for another socket with this descriptor
            return
        except OSError as exc:
            self._cut_off(str(exc))
            return
        if not data:
            self._cut_off("end of stream")
        elif self._pieces or not self.on_data(data):
            self._take(data)

    def _take(self, data: bytes) -> None:
        """Take the frames out of *data* and the pieces before it."""
        self._pieces.append(data)
        self._missing -= len(data)
        if self._missing > 0:
            return
        data = b"".join(self._pieces)
        self._pieces = []
        self._missing = 0
        if not self._is_upgraded:
            head, separator, rest = data.partition(b"\r\n\r\n")
            if not separator:
                self._pieces = [data]
                return
            if not head.startswith(b"HTTP/1.1 101"):
                raise WrongAnswerError(f"no WebSocket: {head[:200]!r}")
            self._is_upgraded = True
            data = rest
        position = 0
        while self._is_upgraded:
            start, end = _bounds(data, position)
            if end > len(data):
                self._missing = end - len(data)
                break
            if not self.on_data(data[position:end]):
                self._receive(data[position], data[start:end])
            position = end
        if position < len(data):
            self._pieces = [data[position:]]

    def _receive(self, first: int, payload: bytes) -> None:
        """Handle one frame that is not what was expected."""
        kind = payload[:2]
        if first == _PING:
            self.send_frame(client_frame(_PONG, payload))
        elif first == _CLOSE:
            self._cut_off(f"closed by the server: {payload!r}")
        elif first != _TEXT:
            raise WrongAnswerError(f"unexpected frame {first:#x}")
        elif kind == b"42":
            self.on_event(payload)
        elif kind == b"43":
            self._acknowledge(payload)
        elif payload == b"2":
            self.send_frame(_PONG_PACKET)
        elif kind[:1] == b"0":
            self.send_frame(_CONNECT_PACKET)
        elif kind == b"40":
            self.is_open = True
            self.on_open(self)
        else:
            raise WrongAnswerError(f"unexpected packet {payload[:200]!r}")

    def _acknowledge(self, payload: bytes) -> None:
        end = payload.index(b"[")
        if payload[2:end] != self._call_number:
            raise WrongAnswerError(f"nobody waits for {payload[:200]!r}")
        self._answer = json.loads(payload[end:])[0]
        self._call_number = b""
        self._loop.stop()

    def send_frame(self, frame: bytes) -> None:
        """Send bytes as they are; return at once."""
        if self._unsent:
            self._unsent += frame
            return
        try:
            sent = self._sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._cut_off(str(exc))
            return
        if sent < len(frame):
            self._unsent = frame[sent:]
            self._loop.want_write(self._descriptor, True)

    def _send_rest(self) -> None:
        frame, self._unsent = self._unsent, b""
        self.send_frame(frame)
        if not self._unsent:
            self._loop.want_write(self._descriptor, False)

    def expect_large(self) -> None:
        """Make room for large frames, so that neither side waits for the other."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def emit(self, event: str, *args: Any) -> None:
        """Send an event without an acknowledgement."""
        self.send_frame(request_frame(b"42" + json.dumps([event, *args]).encode()))

    def call(self, event: str, *args: Any) -> Any:
        """Send an event and return the first argument of its acknowledgement.

        Raises:
            WrongAnswerError: The handler failed.
        """
        self._call_count += 1
        number = b"9%09d" % self._call_count  # distinct from the numbers that measurements use
        self._call_number = number
        packet = b"42" + number + json.dumps([event, *args]).encode()
        self.send_frame(request_frame(packet))
        while self._call_number:
            self._loop.run()
        answer = self._answer
        if isinstance(answer, dict) and "error" in answer:
            raise WrongAnswerError(f"the handler of {event!r} failed: {answer['error']}")
        return answer

    def leave(self) -> None:
        """Start the closing handshake; :attr:`on_closed` is called when the server answers."""
        self._is_leaving = True
        self.send_frame(_CLOSE_FRAME)

    def close(self) -> None:
        """Start the closing handshake, without waiting for the answer."""
        with contextlib.suppress(OSError):
            self._sock.send(_CLOSE_FRAME)
        self._end()

    def abandon(self) -> None:
        """Close the connection without a closing handshake, even if the server has closed it."""
        if self._sock.fileno() >= 0:
            self._end()

    def _cut_off(self, why: str) -> None:
        if not self._is_leaving:
            raise WrongAnswerError(f"connection lost: {why}")
        self._end()
        self.on_closed(self)

    def _end(self) -> None:
        self._is_upgraded = False  # ignore everything that arrives after the close
        self._loop.remove(self._descriptor)
        self._sock.close()


_CONNECT_PACKET = request_frame(b"40")
_PONG_PACKET = request_frame(b"3")
_CLOSE_FRAME = client_frame(_CLOSE, b"\x03\xe8")


def _bounds(data: bytes, position: int) -> tuple[int, int]:
    """Return where the payload of the frame at *position* begins and ends.

    The end lies beyond *data* when the frame is incomplete, also when its length itself is.
    """
    start = position + 2
    if start > len(data):
        return start, start
    length = data[position + 1]
    if length == 126:
        length = int.from_bytes(data[start : start + 2], "big")
        start += 2
    elif length == 127:
        length = int.from_bytes(data[start : start + 8], "big")
        start += 8
    return start, start + length


def _expect_nothing(data: bytes) -> bool:
    return False


def _refuse(packet: bytes) -> None:
    raise WrongAnswerError(f"nobody waits for {packet[:200]!r}")


def _do_nothing(client: Client) -> None:
    pass


def connect(loop: Loop, port: int, count: int) -> list[Client]:
    """Connect *count* clients to the server on *port*, twenty at a time."""
    clients: list[Client] = []
    while len(clients) < count:
        clients += _connect_at_once(loop, port, min(20, count - len(clients)))
    return clients


def _connect_at_once(loop: Loop, port: int, count: int) -> list[Client]:
    missing = count

    def on_open(_: Client) -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            loop.stop()

    clients = [Client(loop, port) for _ in range(count)]
    for client in clients:
        client.on_open = on_open
    while missing:
        loop.run()
    return clients
