"""Clients that speak HTTP, WebSocket and Engine.IO by hand, byte by byte where need be.

They do nothing by themselves: no thread, no answer to a ping unless they are reading. So a test
decides at which byte of a conversation a client stops, goes or breaks.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from typing_extensions import Self

PATH = "/socket.io/"
TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
UNKNOWN_SESSION = "AAAAAAAAAAAAAAAAAAAA"

_TIMEOUT = 5.0
_CHUNK = 65_536
_BATCH = 50
_SEPARATOR = "\x1e"
"""Between the packets of one polling payload (Engine.IO protocol 4)."""
_KEY = "AAAAAAAAAAAAAAAAAAAAAA=="
_UPGRADE_HEADERS = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": _KEY,
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
        return self.text.split(_SEPARATOR) if self.body else []


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


def target(
    transport: str, *, session: str | None = None, query: str = "", version: str = "4"
) -> str:
    """Return the address of an Engine.IO request."""
    parts = [f"EIO={version}", f"transport={transport}"]
    if session is not None:
        parts.append(f"sid={session}")
    if query:
        parts.append(query)
    return f"{PATH}?{'&'.join(parts)}"


def request_bytes(
    method: str,
    address: str,
    *,
    headers: Mapping[str, str | None] | None = None,
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
    address: str,
    *,
    headers: Mapping[str, str | None] | None = None,
    protocol: str = "HTTP/1.1",
) -> bytes:
    """Return the request for a WebSocket; *headers* replace, or with ``None`` remove, its own."""
    return request_bytes(
        "GET", address, headers={**_UPGRADE_HEADERS, **(headers or {})}, protocol=protocol
    )


class RawConnection:
    """One TCP connection to a port on the loopback interface."""

    def __init__(self, port: int, *, timeout: float = _TIMEOUT) -> None:
        self.port = port
        self.timeout = timeout
        self.socket: socket.socket | None = None
        self._buffer = bytearray()

    def dial(self, *, receive_buffer: int | None = None) -> Self:
        """Connect; a small *receive_buffer* makes the server feel early that nobody reads."""
        dialled = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer is not None:
            dialled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        dialled.settimeout(self.timeout)
        dialled.connect(("127.0.0.1", self.port))
        self.socket = dialled
        return self

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        assert self.socket is not None
        self.socket.sendall(data)

    def read_answer(self) -> Answer:
        """Read one HTTP answer.

        Raises:
            ConnectionError: The server closed the connection before it was whole.
        """
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        self._buffer = bytearray(rest)
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return Answer(int(status.split()[1]), headers, self._read_body(headers, status))

    def is_ended_within(self, timeout: float) -> bool:
        """Whether the server ends the connection in time; what it still sends is thrown away."""
        assert self.socket is not None
        deadline = time.monotonic() + timeout
        try:
            while True:
                self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
                if not self.socket.recv(_CHUNK):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
        finally:
            self.socket.settimeout(self.timeout)

    def shut(self) -> None:
        """End the connection with a FIN and no other good-bye."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def reset(self) -> None:
        """End the connection with a RST, as a process that crashes with unread data does."""
        if self.socket is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.shut()

    def __enter__(self) -> Self:
        """Connect."""
        return self.dial()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the connection."""
        self.shut()

    def _fill(self) -> None:
        assert self.socket is not None
        data = self.socket.recv(_CHUNK)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _read_body(self, headers: Mapping[str, str], status: str) -> bytes:
        if " 101 " in f"{status} ":
            return b""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return b"".join(self._read_chunks())
        if "content-length" in headers:
            return self._take(int(headers["content-length"]))
        with contextlib.suppress(ConnectionError):
            while True:
                self._fill()
        return self._take(len(self._buffer))

    def _read_chunks(self) -> Iterator[bytes]:
        while True:
            while b"\r\n" not in self._buffer:
                self._fill()
            line = self._take(self._buffer.index(b"\r\n") + 2)
            size = int(line, 16)
            data = self._take(size + 2)[:-2]
            if not size:
                return
            yield data


class RawWebSocket(RawConnection):
    """A WebSocket that does only what it is told to.

    Pings of Engine.IO and of WebSocket are answered while it reads, and not otherwise.
    """

    def __init__(self, port: int, *, timeout: float = _TIMEOUT) -> None:
        super().__init__(port, timeout=timeout)
        self.session = ""
        self.sid = ""
        self.received: list[str] = []

    def open(
        self, *, query: str = "", session: str | None = None, receive_buffer: int | None = None
    ) -> Self:
        """Open the WebSocket, and without a *session* read which one the server made."""
        self.dial(receive_buffer=receive_buffer)
        self.write(upgrade_bytes(target("websocket", session=session, query=query)))
        self.finish_opening(is_new=session is None)
        if session is not None:
            self.session = session
        return self

    def finish_opening(self, *, is_new: bool = True) -> None:
        """Read the answer to an upgrade request that has been sent."""
        answer = self.read_answer()
        if answer.status != 101:
            raise ConnectionError(f"the upgrade was answered {answer.status}: {answer.text}")
        if is_new:
            self.session = json.loads(self.read_until("0{")[1:])["sid"]

    def join(self, namespace: str = "/") -> Self:
        """Join a namespace, and remember the session id in it."""
        self.send_join(namespace)
        self.finish_joining(namespace)
        return self

    def send_join(self, namespace: str = "/") -> None:
        """Ask to join a namespace."""
        self.send(f"40{_prefix(namespace)}")

    def finish_joining(self, namespace: str = "/") -> None:
        """Wait until the server has let this client into the namespace."""
        prefix = f"40{_prefix(namespace)}"
        self.sid = json.loads(self.read_until(prefix + "{")[len(prefix) :])["sid"]

    def upgrade(self) -> Self:
        """Say what takes a polling session over to this WebSocket."""
        self.send("2probe")
        self.read_until("3probe")
        self.send("5")
        return self

    def send(self, text: str) -> None:
        """Send one text frame."""
        self.write(frame_bytes(TEXT, text.encode()))

    def emit(self, event: str, *args: Any, ack_id: int | None = None, namespace: str = "/") -> None:
        """Send an event, with a request for an acknowledgement if *ack_id* is given."""
        number = "" if ack_id is None else str(ack_id)
        self.send(f"42{_prefix(namespace)}{number}{json.dumps([event, *args])}")

    def call(self, event: str, *args: Any, ack_id: int, namespace: str = "/") -> Any:
        """Send an event and return what it was acknowledged with, one value or a list."""
        self.emit(event, *args, ack_id=ack_id, namespace=namespace)
        prefix = f"43{_prefix(namespace)}{ack_id}"
        values = json.loads(self.read_until(prefix + "[")[len(prefix) :])
        return values[0] if len(values) == 1 else values

    def read_frame(self) -> tuple[int, bytes]:
        """Return opcode and payload of the next frame."""
        while (frame := self._parse_frame()) is None:
            self._fill()
        return frame

    def read_until(self, *prefixes: str, timeout: float | None = None) -> str:
        """Read until a text begins with one of *prefixes*, and return it.

        Raises:
            AssertionError: It did not come before the server closed or the time was up.
        """
        deadline = time.monotonic() + (timeout or self.timeout)
        while time.monotonic() < deadline:
            try:
                opcode, payload = self.read_frame()
            except TimeoutError:
                break
            except ConnectionError as error:
                raise AssertionError(f"{error} before {prefixes} came") from None
            if opcode == CLOSE:
                raise AssertionError(f"the server closed before {prefixes} came: {payload!r}")
            text = self.take(opcode, payload)
            if text.startswith(prefixes):
                return text
        raise AssertionError(f"{prefixes} did not come; received: {self.received}")

    def take(self, opcode: int, payload: bytes) -> str:
        """Answer a ping; return a text, empty for all other frames."""
        if opcode == PING:
            self.write(frame_bytes(PONG, payload))
        if opcode != TEXT:
            return ""
        text = payload.decode()
        if text == "2":
            self.send("3")
        else:
            self.received.append(text)
        return text

    def read_farewell(self, *, timeout: float = _TIMEOUT) -> Farewell:
        """Read until the server ends the connection, and return how it did.

        Raises:
            AssertionError: It did not in time.
        """
        assert self.socket is not None
        deadline = time.monotonic() + timeout
        while True:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                opcode, payload = self.read_frame()
                if opcode == CLOSE:
                    return farewell(payload)
                self.take(opcode, payload)
            except TimeoutError:
                raise AssertionError(f"not closed within {timeout:g} s") from None
            except OSError:
                return Farewell(None, "", time.monotonic())

    def _parse_frame(self) -> tuple[int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        size, begin = buffer[1] & 0x7F, 2
        if size >= 126:
            begin = 4 if size == 126 else 10
            if len(buffer) < begin:
                return None
            size = int.from_bytes(buffer[2:begin], "big")
        if len(buffer) < begin + size:
            return None
        payload = bytes(buffer[begin : begin + size])
        opcode = buffer[0] & 0x0F
        del buffer[: begin + size]
        return opcode, payload

    def close(self) -> None:
        """Leave as a browser does: close frame, its answer, end of the connection."""
        if self.socket is not None:
            with contextlib.suppress(OSError, AssertionError):
                self.write(frame_bytes(CLOSE, struct.pack("!H", 1000)))
                self.read_farewell(timeout=1.0)
            self.shut()


class PollingClient:
    """A client that polls: each request is sent when it is told to, on a connection of its own."""

    def __init__(self, port: int, *, timeout: float = _TIMEOUT, query: str = "") -> None:
        self.port = port
        self.session = ""
        self.sid = ""
        self._timeout = timeout
        self._query = query
        self._pending: list[RawConnection] = []

    def open(self) -> Self:
        """Open a session."""
        answer = self.request("GET")
        assert answer.status == 200, answer
        self.session = json.loads(answer.packets[0][1:])["sid"]
        return self

    def join(self, namespace: str = "/") -> Self:
        """Join a namespace, and remember the session id in it."""
        prefix = f"40{_prefix(namespace)}"
        assert self.post(prefix).status == 200
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            for packet in self.get().packets:
                if packet.startswith(prefix + "{"):
                    self.sid = json.loads(packet[len(prefix) :])["sid"]
                    return self
        raise AssertionError(f"the client was not let into {namespace}")

    def post(self, *packets: str) -> Answer:
        """Send packets and wait for the answer."""
        return self.request("POST", _SEPARATOR.join(packets))

    def get(self) -> Answer:
        """Poll once, as long as it takes; answer a ping that comes."""
        answer = self.request("GET")
        if "2" in answer.packets:
            self.post("3")
        return answer

    def request(self, method: str, body: str = "") -> Answer:
        """Send one request and wait for its answer."""
        connection = self.begin(method, body)
        try:
            return connection.read_answer()
        finally:
            connection.shut()
            self._pending.remove(connection)

    def begin(self, method: str, body: str = "") -> RawConnection:
        """Send one request and do not wait for its answer."""
        connection = RawConnection(self.port, timeout=self._timeout).dial()
        self._pending.append(connection)
        address = target("polling", session=self.session or None, query=self._query)
        connection.write(
            request_bytes(
                method,
                address,
                headers={"Connection": "close", "Content-Type": "text/plain;charset=UTF-8"},
                body=body.encode(),
            )
        )
        return connection

    def vanish(self) -> None:
        """Break off the requests that wait for an answer, and say nothing."""
        for connection in self._pending:
            connection.reset()
        self._pending.clear()


C = TypeVar("C", bound=RawConnection)


@dataclass
class Crowd:
    """Many idle clients on WebSockets, in one thread that answers their pings.

    Attributes:
        port: Where the server listens.
        count: How many they are.
        farewells: How the server ended those that it has ended, in this order.
    """

    port: int
    count: int
    farewells: list[Farewell] = field(default_factory=list)
    _clients: list[RawWebSocket] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def open(self, *, query: str = "") -> None:
        """Let all of them in, and begin to answer their pings."""
        while len(self._clients) < self.count:
            size = min(_BATCH, self.count - len(self._clients))
            self._clients += open_many(self.port, size, query=query)
        self._thread = threading.Thread(target=self._attend, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End what is left of them."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(_TIMEOUT)
        for client in self._clients:
            client.shut()

    def __enter__(self) -> Self:
        """Let all of them in."""
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End what is left of them."""
        self.close()

    def _attend(self) -> None:
        with selectors.DefaultSelector() as selector:
            for client in self._clients:
                assert client.socket is not None
                client.socket.setblocking(False)
                selector.register(client.socket, selectors.EVENT_READ, client)
            while selector.get_map() and not self._is_over.is_set():
                for key, _ in selector.select(timeout=0.1):
                    seen = self._read(key.data)
                    if seen is not None:
                        selector.unregister(key.fileobj)
                        self.farewells.append(seen)
                        key.data.shut()

    @staticmethod
    def _read(client: RawWebSocket) -> Farewell | None:
        """Read what is there; return how the server ended the connection, if it did."""
        try:
            while True:
                opcode, payload = client.read_frame()
                if opcode == CLOSE:
                    with contextlib.suppress(OSError):
                        client.write(frame_bytes(CLOSE, payload[:2]))
                    return farewell(payload)
                client.take(opcode, payload)
        except BlockingIOError:
            return None
        except OSError:
            return Farewell(None, "", time.monotonic())


class RawClients:
    """The raw clients of one test; none outlives it."""

    def __init__(self) -> None:
        self._connections: list[RawConnection] = []
        self._polling: list[PollingClient] = []

    def connection(self, port: int, *, timeout: float = _TIMEOUT) -> RawConnection:
        """Return a connection that is not dialled yet."""
        return self._keep(RawConnection(port, timeout=timeout))

    def websocket(self, port: int, *, timeout: float = _TIMEOUT) -> RawWebSocket:
        """Return a WebSocket that is not opened yet."""
        return self._keep(RawWebSocket(port, timeout=timeout))

    def many(
        self, port: int, count: int, *, query: str = "", namespace: str = "/"
    ) -> list[RawWebSocket]:
        """Let *count* clients into a namespace."""
        clients = open_many(port, count, query=query, namespace=namespace)
        self._connections += clients
        return clients

    def polling(self, port: int, *, query: str = "", timeout: float = _TIMEOUT) -> PollingClient:
        """Return a client that polls and has no session yet."""
        client = PollingClient(port, query=query, timeout=timeout)
        self._polling.append(client)
        return client

    def close(self) -> None:
        """End all of them."""
        for connection in self._connections:
            connection.shut()
        for client in self._polling:
            client.vanish()

    def _keep(self, connection: C) -> C:
        self._connections.append(connection)
        return connection


def open_many(
    port: int, count: int, *, query: str = "", namespace: str = "/"
) -> list[RawWebSocket]:
    """Let *count* clients into a namespace, all at the same time."""
    clients = [RawWebSocket(port, timeout=4 * _TIMEOUT).dial() for _ in range(count)]
    request = upgrade_bytes(target("websocket", query=query))
    for client in clients:
        client.write(request)
    for client in clients:
        client.finish_opening()
        client.send_join(namespace)
    for client in clients:
        client.finish_joining(namespace)
    return clients


def frame_bytes(opcode: int, payload: bytes, *, is_final: bool = True) -> bytes:
    """Return one frame as a client sends it.

    Its mask consists of zeros, which is legal and leaves the payload as it is.
    """
    first = opcode | (0x80 if is_final else 0)
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 65_536:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    return head + bytes(4) + payload


def farewell(payload: bytes) -> Farewell:
    """Return what the payload of a close frame says."""
    code = struct.unpack("!H", payload[:2])[0] if len(payload) >= 2 else None
    return Farewell(code, payload[2:].decode(errors="replace"), time.monotonic())


def ask(
    port: int,
    method: str,
    address: str,
    *,
    headers: Mapping[str, str | None] | None = None,
    body: bytes = b"",
) -> Answer:
    """Send one HTTP request on a connection of its own and return the answer."""
    with RawConnection(port) as connection:
        connection.write(
            request_bytes(
                method, address, headers={"Connection": "close", **(headers or {})}, body=body
            )
        )
        return connection.read_answer()


def _prefix(namespace: str) -> str:
    return "" if namespace == "/" else f"{namespace},"
