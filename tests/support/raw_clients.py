"""Clients that speak Engine.IO and Socket.IO by hand, one at a time or many.

They answer pings while they read, and not otherwise.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from tests.support.raw_websocket import (
    CLOSE,
    PING,
    PONG,
    SEPARATOR,
    TEXT,
    TIMEOUT,
    Answer,
    Farewell,
    Frame,
    RawConnection,
    close_frame,
    encode_frame,
    request_bytes,
    target,
    text_frame,
    upgrade_bytes,
)

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from tests.support.raw_websocket import Headers

_BATCH = 50


def prefix_of(namespace: str) -> str:
    """Return what names *namespace* in a packet."""
    return "" if namespace == "/" else f"{namespace},"


class RawWebSocket(RawConnection):
    """A Socket.IO client on a WebSocket that does only what it is told to."""

    session = ""
    """The session id of Engine.IO."""
    sid = ""
    """The session id of the namespace that was joined last."""

    def __init__(self, port: int, **options: Any) -> None:
        super().__init__(port, **options)
        self.received: list[str] = []
        """What :meth:`read_until` has come across."""

    def open(
        self, *, query: str = "", session: str | None = None, headers: Headers | None = None
    ) -> Self:
        """Open the WebSocket, and without a *session* read which one the server made.

        Raises:
            AssertionError: The server refused.
        """
        address = target("websocket", session=session, query=query)
        self.dial().write(upgrade_bytes(address, headers=headers))
        self.finish_opening(session)
        return self

    def finish_opening(self, session: str | None = None) -> None:
        """Read the answer to an upgrade request that has been sent."""
        answer = self.read_answer()
        assert answer.status == 101, (
            f"the WebSocket handshake was answered with {answer.status}: {answer.text}"
        )
        self.session = session or json.loads(self.read_until("0{")[1:])["sid"]

    def join(self, namespace: str = "/") -> Self:
        """Join a namespace, and remember the session id in it."""
        self.send_join(namespace)
        self.finish_joining(namespace)
        return self

    def send_join(self, namespace: str = "/") -> None:
        """Ask to join a namespace."""
        self.send(f"40{prefix_of(namespace)}")

    def finish_joining(self, namespace: str = "/") -> None:
        """Wait until the server has let this client into the namespace."""
        prefix = f"40{prefix_of(namespace)}"
        self.sid = json.loads(self.read_until(prefix + "{")[len(prefix) :])["sid"]

    def send(self, text: str) -> None:
        """Send one text frame."""
        self.write(text_frame(text))

    def emit(self, event: str, *args: Any, ack_id: int | None = None, namespace: str = "/") -> None:
        """Send an event, with a request for an acknowledgement if *ack_id* is given."""
        number = "" if ack_id is None else str(ack_id)
        self.send(f"42{prefix_of(namespace)}{number}{json.dumps([event, *args])}")

    def call(self, event: str, *args: Any, ack_id: int, namespace: str = "/") -> list[Any]:
        """Send an event and return the arguments of its acknowledgement."""
        self.emit(event, *args, ack_id=ack_id, namespace=namespace)
        return self.read_ack(ack_id, namespace=namespace)

    def read_ack(self, ack_id: int, *, namespace: str = "/") -> list[Any]:
        """Return the arguments of the acknowledgement with that number; skip what comes before."""
        prefix = f"43{prefix_of(namespace)}{ack_id}"
        answer: list[Any] = json.loads(self.read_until(prefix + "[")[len(prefix) :])
        return answer

    def read_until(self, *prefixes: str, timeout: float | None = None) -> str:
        """Read until a text begins with one of *prefixes*, and return it.

        Raises:
            AssertionError: It did not come before the server closed or the time was up.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        with contextlib.suppress(TimeoutError):
            while (frame := self.read_frame(deadline - time.monotonic())) is not None:
                if frame.opcode == TEXT:
                    self.received.append(frame.text)
                    if frame.text.startswith(prefixes):
                        return frame.text
            raise AssertionError(f"the server closed before {prefixes} came: {self.farewell}")
        raise AssertionError(f"{prefixes} did not come; received: {self.received}")

    def read_frame(self, timeout: float | None = None) -> Frame | None:
        """Return the next frame that is no ping, or ``None`` when the server has closed.

        Raises:
            TimeoutError: Nothing came in time.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while (frame := self.receive_frame(deadline - time.monotonic())) is not None:
            if frame.opcode == PING:
                self._answer(encode_frame(PONG, frame.payload))
            elif frame == (TEXT, b"2"):
                self._answer(text_frame("3"))
            else:
                return None if frame.opcode == CLOSE else frame
        return None

    def read_farewell(self, *, timeout: float | None = None) -> Farewell:
        """Read until the server says or makes an end, and return how it did.

        Raises:
            AssertionError: It did not in time.
        """
        timeout = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        try:
            while self.farewell is None:
                self.read_frame(deadline - time.monotonic())
        except TimeoutError:
            raise AssertionError(f"not closed within {timeout:g} s") from None
        return self.farewell

    def read_to_end(self, *, timeout: float | None = None) -> Farewell:
        """Read the farewell and, behind it, the end of the connection.

        Raises:
            AssertionError: The connection has not ended in time, or the farewell was not the last.
        """
        timeout = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        farewell = self.read_farewell(timeout=timeout)
        try:
            after = self.receive_frame(deadline - time.monotonic())
        except TimeoutError:
            raise AssertionError(f"the connection was not ended within {timeout:g} s") from None
        assert after is None, f"a frame came after the farewell: {after}"
        return farewell

    def close(self) -> None:
        """Leave as a browser does: close frame, its answer, end of the connection."""
        with contextlib.suppress(OSError, AssertionError):
            self.write(close_frame(1000))
            self.read_farewell(timeout=1.0)
        self.shut()

    def _answer(self, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # what the server has sent can still be read
            self.write(frame)


class PollingClient:
    """A client that polls: each request is sent when it is told to, on a connection of its own."""

    def __init__(self, port: int, *, timeout: float = TIMEOUT, query: str = "") -> None:
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
        prefix = f"40{prefix_of(namespace)}"
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
        return self.request("POST", SEPARATOR.join(packets))

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
        address = target("polling", session=self.session, query=self._query)
        headers = {"Connection": "close", "Content-Type": "text/plain;charset=UTF-8"}
        connection.write(request_bytes(method, address, headers=headers, body=body.encode()))
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

    def open(self) -> None:
        """Let all of them in, and begin to answer their pings."""
        while len(self._clients) < self.count:
            self._clients += open_many(self.port, min(_BATCH, self.count - len(self._clients)))
        self._thread = threading.Thread(target=self._attend, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End what is left of them."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(TIMEOUT)
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
                selector.register(client.sock, selectors.EVENT_READ, client)
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
            while client.read_frame(0.0) is not None:
                pass
        except TimeoutError:
            return None
        assert client.farewell is not None
        with contextlib.suppress(OSError):
            client.write(close_frame(client.farewell.code))
        return client.farewell


class RawClients:
    """The raw clients of one test; none outlives it."""

    def __init__(self) -> None:
        self._connections: list[RawConnection] = []
        self._polling: list[PollingClient] = []

    def connection(self, port: int, **options: Any) -> RawConnection:
        """Return a connection that is not dialled yet."""
        return self._keep(RawConnection(port, **options))

    def websocket(self, port: int, **options: Any) -> RawWebSocket:
        """Return a WebSocket that is not opened yet."""
        return self._keep(RawWebSocket(port, **options))

    def many(self, port: int, count: int, *, query: str = "") -> list[RawWebSocket]:
        """Let *count* clients in."""
        clients = open_many(port, count, query=query)
        self._connections += clients
        return clients

    def polling(self, port: int, *, query: str = "") -> PollingClient:
        """Return a client that polls and has no session yet."""
        client = PollingClient(port, query=query)
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


def open_many(port: int, count: int, *, query: str = "") -> list[RawWebSocket]:
    """Let *count* clients in, all at the same time."""
    clients = [RawWebSocket(port, timeout=4 * TIMEOUT).dial() for _ in range(count)]
    for client in clients:
        client.write(upgrade_bytes(target("websocket", query=query)))
    for client in clients:
        client.finish_opening()
        client.send_join()
    for client in clients:
        client.finish_joining()
    return clients


def ask(port: int, method: str, address: str, *, body: bytes = b"") -> Answer:
    """Send one HTTP request on a connection of its own and return the answer."""
    with RawConnection(port) as connection:
        request = request_bytes(method, address, headers={"Connection": "close"}, body=body)
        connection.dial().write(request)
        return connection.read_answer()
