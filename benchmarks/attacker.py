"""Shared by all attackers: TCP connections that count their bytes, and the protocols on them.

An attacker is a separate process, with a lower priority than the measuring client. It sends
bytes that were built in advance, and reads whatever arrives meanwhile.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.client import client_frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

TEXT, BINARY, PING, COMPRESSED = 0x81, 0x82, 0x89, 0xC1

_CHUNK = 256 * 1024
_DIAL_TIMEOUT = 20.0
_JOIN_TIME = 0.1  # seconds to wait if the answer cannot be read
_GRACE = 0.5  # seconds for an answer, beyond the end of the attack
_REST = 0.02  # seconds before the next attempt after a failed one
_TAIL = 127  # bytes: the largest close frame
_JOIN = client_frame(TEXT, b"40")
_DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover\r\n"
_CODE = re.compile(rb'"code": ?"([a-z_]+)"')
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
_FAREWELL = re.compile(rb"\x88[\x02-\x7d](..)[^\x80-\xff]*\Z", re.DOTALL)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_SESSION = re.compile(rb'"sid": ?"([^"]+)"')
_ROUTINE = frozenset({b"200", b"101"})


class UselessAttackError(Exception):
    """An attack did not do what it was made for."""


class Attacker:
    """The duration of an attack, and its results.

    Args:
        port: Where the server listens.
        seconds: How long the attack lasts.

    Attributes:
        units: Number of events, requests or connects sent, as the attack counts them.
        sent: Bytes that the server has read.
        received: Bytes that it has sent.
        opened: Connections that were accepted.
        told: The server's answers: error codes, close codes, HTTP statuses.
    """

    def __init__(self, port: int, seconds: float) -> None:
        self.port = port
        self.units = self.sent = self.received = self.opened = 0
        self.told: Counter[str] = Counter()
        self._stop_at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end, 0 when it is over."""
        return max(0.0, self._stop_at - time.monotonic())

    def dial(self) -> WebSocketTransport:
        """Return a TCP connection."""
        return WebSocketTransport(self)

    def websocket(self, *, query: str = "", is_compressed: bool = False) -> WebSocketTransport:
        """Return a WebSocket that has joined ``/``, or a closed one if the server refused it."""
        wire = self.dial()
        handshake = (
            f"GET /socket.io/?EIO=4&transport=websocket{query} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{_DEFLATE * is_compressed}\r\n"
        )
        if is_compressed:  # and so are the answers
            if wire.call(handshake.encode(), b"permessage-deflate"):
                wire.write(_JOIN)
                wire.drain(_JOIN_TIME)
        elif wire.call(handshake.encode(), b'0{"sid"'):
            wire.call(_JOIN, b"40{")
        return self._let_in(wire)

    def poller(self) -> tuple[WebSocketTransport, str]:
        """Return a connection whose polling session has joined ``/``, and its address."""
        wire = self.dial()
        address = "/socket.io/?EIO=4&transport=polling"
        found = _SESSION.search(wire.ask(request("GET", address)))
        if found is None:
            wire.close()
        else:
            address += f"&sid={found[1].decode()}"
            wire.ask(request("POST", address, b"40"))
            wire.ask(request("GET", address))
        return self._let_in(wire), address

    def _let_in(self, wire: WebSocketTransport) -> WebSocketTransport:
        if wire.is_open:
            self.opened += 1
        else:
            time.sleep(min(_REST, self.left))
        return wire

    def settle(self) -> None:
        """Subtract the bytes that the server has not read; to be called before the wires close."""
        if not self.left:
            self.sent -= _unread(self.port)


class WebSocketTransport:
    """One TCP connection, as a context manager.

    Attributes:
        is_open: Whether neither side has closed it.
        is_reading: Whether data from the server is read.
    """

    def __init__(self, attacker: Attacker) -> None:
        self.is_open = True
        self.is_reading = True
        self._attacker = attacker
        self._is_listening = False
        self._recent = b""  # the last bytes received
        self._sock = socket.create_connection(("127.0.0.1", attacker.port), _DIAL_TIMEOUT)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: bytes) -> bool:
        """Send *data*, and read meanwhile; return whether this connection can still be used."""
        rest = memoryview(data)
        while rest and self.is_open and self._attacker.left:
            readable, writable = self._wait(self._attacker.left, has_more=True)
            if readable:
                self._read()
            if writable and self.is_open:
                try:
                    count = self._sock.send(rest[:_CHUNK])
                except BlockingIOError:
                    continue
                except OSError:
                    self._end()
                    break
                self._attacker.sent += count
                rest = rest[count:]
        return self.is_open and not rest and self._attacker.left > 0

    def call(self, data: bytes, until: bytes) -> bool:
        """Send *data* and read until *until* has arrived; return whether it has."""
        return until in self._exchange(data, lambda: until in self._recent)

    def ask(self, data: bytes) -> bytes:
        """Send one HTTP request and return the answer, empty if there was none."""
        return self._exchange(data, self._has_answer)

    def _exchange(self, data: bytes, is_done: Callable[[], bool]) -> bytes:
        self._recent = b""
        self._is_listening = True
        self.write(data)
        give_up_at = time.monotonic() + self._attacker.left + _GRACE
        while not (done := is_done()) and self.is_open and time.monotonic() < give_up_at:
            status = _STATUS.match(self._recent)
            if status is not None and status[1] not in _ROUTINE and self._has_answer():
                done = is_done()
                break
            self._wait(_GRACE)
            self._read()
        self._is_listening = False
        if not done:
            self.close()
            return b""
        return self._recent

    def _has_answer(self) -> bool:
        """Return whether a complete HTTP answer has arrived."""
        head, separator, body = self._recent.partition(b"\r\n\r\n")
        found = _LENGTH.search(head)
        return bool(separator) and len(body) >= (int(found[1]) if found else 0)

    def drain(self, seconds: float | None = None) -> None:
        """Read for that many seconds, or until the attack is over."""
        until = time.monotonic() + (self._attacker.left if seconds is None else seconds)
        while self.is_open and (left := min(until - time.monotonic(), self._attacker.left)) > 0:
            if self._wait(left)[0]:
                self._read()

    def close(self) -> bool:
        """Close the connection; return whether the server had announced its end."""
        found = _FAREWELL.search(self._recent[-_TAIL:]) if self.is_open else None
        if found is not None:
            self._attacker.told[f"closed {struct.unpack('!H', found[1])[0]}"] += 1
        self.is_open = False
        self._sock.close()
        return found is not None

    def _wait(self, seconds: float, *, has_more: bool = False) -> tuple[bool, bool]:
        readers = [self._sock] if self.is_reading and self.is_open else []
        writers = [self._sock] if has_more else []
        readable, writable, _ = select.select(readers, writers, [], seconds)
        return bool(readable), bool(writable)

    def _read(self) -> None:
        if not self.is_open:
            return
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        attacker = self._attacker
        attacker.received += len(data)
        self._recent = (self._recent + data)[-_CHUNK:] if self._is_listening else data[-_TAIL:]
        attacker.told.update(code.decode() for code in _CODE.findall(data))
        attacker.told.update(
            f"HTTP {status.decode()}" for status in _STATUS.findall(data) if status not in _ROUTINE
        )

    def _end(self) -> None:
        """Record that the server has closed the connection."""
        if not self.close():
            self._attacker.told["connection ended"] += 1


def request(method: str, address: str, body: bytes = b"", headers: str = "") -> bytes:
    """Return one HTTP request."""
    head = f"{method} {address} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}"
    if method == "POST":
        head += f"Content-Type: text/plain;charset=UTF-8\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


def _unread(port: int) -> int:
    """Return the number of bytes in flight to *port*, in the socket buffers of both sides.

    Source:
        ``/proc/net/tcp``: local and remote address, state, and ``tx_queue:rx_queue`` in hex.
    """
    count = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, queues, *_ = line.split()
        if state == "0A":  # listens: the queues are of connections
            continue
        sending, receiving = (int(queue, 16) for queue in queues.split(":"))
        if int(local.rpartition(":")[2], 16) == port:
            count += receiving
        elif int(remote.rpartition(":")[2], 16) == port:
            count += sending
    return count
