"""Socket.IO clients that remember what they receive, and when."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import websocket
from socketio.packet import DISCONNECT, Packet

from demo.clients import OrderedClient
from tests.support.waiting import USUAL_TIMEOUT, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import socketio
    from typing_extensions import Self

_CONNECT_TIMEOUT = USUAL_TIMEOUT
_EVENT_FRAME = re.compile(r"^42(?P<namespace>/[^,]*,)?(?P<id>\d+)?(?P<payload>\[.*\])$", re.DOTALL)


def disconnect(client: socketio.Client) -> None:
    """Say goodbye in each namespace, and close the connection once that has been sent.

    ``socketio.Client.disconnect`` does both at once: whatever a client that polls has not sent by
    then, because an earlier request is still being answered, it never sends, its goodbye included.
    The server learns that it is gone at the ping timeout.
    """
    engine = client.eio
    with contextlib.suppress(Exception):
        for namespace in list(client.namespaces):
            client._send_packet(Packet(DISCONNECT, namespace=namespace))
        wait_until(
            lambda: (
                not engine.queue.unfinished_tasks
                or engine.state != "connected"
                or engine.write_loop_task is None
            )
        )
        engine.disconnect()
    # Where the server went first, the client forgets its socket without closing it.
    if engine.ws is not None:
        engine.ws.shutdown()


@dataclass(frozen=True)
class Received:
    """One event and the instant (monotonic, seconds) at which the client had it."""

    event: str
    args: tuple[Any, ...]
    at: float


class SocketIOClient:
    """python-socketio's client on a WebSocket. It does not reconnect by itself.

    Every event is recorded in the order of arrival, and acknowledged with what *answer* returns
    for it.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "/",
        query: str = "",
        answer: Callable[..., Any] | None = None,
        transports: tuple[str, ...] = ("websocket",),
    ) -> None:
        self.namespace = namespace
        self._transports = list(transports)
        self.received: list[Received] = []
        self.connect_error: Any = None
        self.disconnected = threading.Event()
        self._url = url + (f"?{query}" if query else "")
        self._answer = answer or (lambda *_args: "ok")
        self._client = OrderedClient(reconnection=False)
        self._client.on("*", self._take, namespace=namespace)
        self._client.on("disconnect", self._note_disconnect, namespace=namespace)
        self._client.on("connect_error", self._note_connect_error, namespace=namespace)

    @property
    def sid(self) -> str:
        """The session id on the client's namespace."""
        return str(self._client.get_sid(self.namespace))

    def is_connected(self) -> bool:
        """Whether the client believes that it is connected to its namespace."""
        return bool(self._client.connected) and self.namespace in self._client.namespaces

    def connect(self, timeout: float = _CONNECT_TIMEOUT) -> None:
        """Connect, and wait until the server admits the client."""
        self._client.connect(
            self._url,
            transports=self._transports,
            namespaces=[self.namespace],
            wait_timeout=timeout,
        )

    def emit(self, event: str, *args: Any) -> None:
        """Send an event without waiting for an acknowledgement."""
        self._client.emit(event, args, namespace=self.namespace)

    def call(self, event: str, *args: Any, timeout: float = USUAL_TIMEOUT) -> Any:
        """Send an event and return its acknowledgement.

        Raises:
            socketio.exceptions.TimeoutError: None came within *timeout* seconds.
        """
        return self._client.call(event, args, namespace=self.namespace, timeout=timeout)

    def events(self, event: str) -> list[Received]:
        """Return what was received under the name *event* so far."""
        return [item for item in self.received if item.event == event]

    def wait_for(
        self, event: str, *, count: int = 1, timeout: float = USUAL_TIMEOUT, message: str = ""
    ) -> list[Received]:
        """Wait until *count* events of that name are there, and return them."""
        wait_until(
            lambda: len(self.events(event)) >= count,
            timeout=timeout,
            message=message or f"{count} of {event!r} did not arrive",
        )
        return self.events(event)

    def close(self) -> None:
        """Disconnect; calling it again does nothing."""
        disconnect(self._client)

    def __enter__(self) -> Self:
        """Connect."""
        self.connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect."""
        self.close()

    def _take(self, event: str, *args: Any) -> Any:
        self.received.append(Received(event, args, time.monotonic()))
        return self._answer(event, *args)

    def _note_disconnect(self, *_reason: Any) -> None:
        self.disconnected.set()

    def _note_connect_error(self, data: Any) -> None:
        self.connect_error = data


class RawClient:
    """A WebSocket that speaks just enough Engine.IO to stay open, and sends any frame.

    It answers pings and nothing else: no event is ever acknowledged.
    """

    def __init__(self, websocket_url: str, *, namespace: str = "/", query: str = "") -> None:
        self.namespace = namespace
        self.frames: list[tuple[str, float]] = []
        self.sid = ""
        self._url = (
            f"{websocket_url}/socket.io/?EIO=4&transport=websocket{'&' if query else ''}{query}"
        )
        self._prefix = "" if namespace == "/" else f"{namespace},"
        self._socket: websocket.WebSocket | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._is_closed = threading.Event()

    def open(self, timeout: float = _CONNECT_TIMEOUT) -> None:
        """Open the Engine.IO connection; no namespace is joined yet."""
        self._socket = websocket.create_connection(self._url, timeout=timeout)
        self._socket.settimeout(None)
        self._reader.start()
        self.wait_for_frame("0{", timeout=timeout)

    def connect(self, timeout: float = _CONNECT_TIMEOUT) -> None:
        """Open the connection, join the namespace and remember the session id."""
        self.open(timeout)
        self.send(f"40{self._prefix}")
        frame = self.wait_for_frame(f"40{self._prefix}{{", timeout=timeout)
        self.sid = json.loads(frame[2 + len(self._prefix) :])["sid"]

    def send(self, frame: str) -> None:
        """Send one text frame as it is."""
        assert self._socket is not None
        self._socket.send(frame)

    def emit(self, event: str, *args: Any, ack_id: int | None = None) -> None:
        """Send an event, with a request for an acknowledgement if *ack_id* is given."""
        number = "" if ack_id is None else str(ack_id)
        self.send(f"42{self._prefix}{number}{json.dumps([event, *args])}")

    def call(
        self, event: str, *args: Any, ack_id: int, timeout: float = USUAL_TIMEOUT
    ) -> list[Any]:
        """Send an event and return the arguments of its acknowledgement."""
        self.emit(event, *args, ack_id=ack_id)
        return self.wait_for_ack(ack_id, timeout=timeout)

    def wait_for_ack(
        self, ack_id: int, *, timeout: float = USUAL_TIMEOUT, message: str = ""
    ) -> list[Any]:
        """Return the arguments of the acknowledgement with that number."""
        prefix = f"43{self._prefix}{ack_id}["
        frame = self.wait_for_frame(prefix, timeout=timeout, message=message)
        arguments: list[Any] = json.loads(frame[len(prefix) - 1 :])
        return arguments

    def wait_for_frame(
        self, prefix: str, *, timeout: float = USUAL_TIMEOUT, message: str = ""
    ) -> str:
        """Return the first frame, past or to come, that begins with *prefix*."""

        def find() -> str | None:
            return next((text for text, _ in list(self.frames) if text.startswith(prefix)), None)

        found = wait_until(
            find, timeout=timeout, message=message or f"no frame {prefix!r} was received"
        )
        assert found is not None
        return found

    def events(self, event: str) -> list[Received]:
        """Return what was received under the name *event* so far."""
        found = []
        for text, at in list(self.frames):
            match = _EVENT_FRAME.match(text)
            if match and (match["namespace"] or "") == self._prefix:
                name, *args = json.loads(match["payload"])
                if name == event:
                    found.append(Received(event, tuple(args), at))
        return found

    def is_open(self) -> bool:
        """Whether the server has not closed the connection."""
        return self._reader.is_alive() and not self._is_closed.is_set()

    def vanish(self) -> None:
        """End the TCP connection without a Socket.IO or WebSocket good-bye."""
        # Closing alone would wait for the reader, which is inside recv(), and which lets go of
        # the socket when the server closes it.
        if self._socket is not None:
            with contextlib.suppress(OSError, AttributeError):
                self._socket.sock.shutdown(socket.SHUT_RDWR)
        if self._reader.is_alive():
            self._reader.join(2.0)
        if self._socket is not None:
            self._socket.shutdown()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Leave; calling it again does nothing."""
        self.vanish()

    def __enter__(self) -> Self:
        """Connect."""
        self.connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _read(self) -> None:
        assert self._socket is not None
        try:
            while True:
                frame = self._socket.recv()
                if not frame:
                    break
                text = frame if isinstance(frame, str) else f"b{frame.hex()}"
                if text == "2":
                    self._socket.send("3")
                else:
                    self.frames.append((text, time.monotonic()))
        except (OSError, websocket.WebSocketException, ValueError):
            pass
        finally:
            self._is_closed.set()
