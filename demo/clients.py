"""The clients of the check: one that behaves, and one that does not."""

from __future__ import annotations

import json
import socket
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import engineio
import socketio
import websocket

if TYPE_CHECKING:
    from demo.servers import Process

PIT = "Tea"
TIMEOUT = 5.0
CLIENT_ERRORS = (OSError, websocket.WebSocketException, socketio.exceptions.SocketIOError)


class Beat(NamedTuple):
    """One event of a stream, as one client heard it. Instants are Unix time."""

    process: str
    pid: int
    number: int
    sent_at: float
    heard_at: float


class _OrderedEngineClient(engineio.Client):
    """Handles messages one after the other.

    As it stands, each gets a thread of its own, and of two that come close together the second
    may be handled first.
    """

    def _trigger_event(self, event: str, *args: Any, **kwargs: Any) -> Any:
        return super()._trigger_event(event, *args, **{**kwargs, "run_async": False})


class OrderedClient(socketio.Client):
    """python-socketio's client, with events handled in the order in which they come."""

    def _engineio_client_class(self) -> type[engineio.Client]:
        return _OrderedEngineClient


class Watcher:
    """The standard client. It hears the streams, and reconnects by itself."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.beats: list[Beat] = []
        self.client = OrderedClient(reconnection_delay=0.2, reconnection_delay_max=1.0)
        self.client.on("connect", self._watch)
        self.client.on("demo:beat", self._hear)
        self.client.on("demo:question", lambda: "yes")
        self.client.connect(process.url, auth={"name": "Check"}, transports=["websocket"])

    @property
    def sid(self) -> str:
        """The session id, by which a process can ask this client something."""
        return str(self.client.get_sid())

    def close(self) -> None:
        """Disconnect for good."""
        self.client.shutdown()

    def _watch(self) -> None:
        self.client.emit("join", PIT)
        self.client.emit("demo:watch")

    def _hear(self, beat: dict[str, Any]) -> None:
        self.beats.append(
            Beat(beat["process"], beat["pid"], beat["n"], beat["at"], heard_at=time.time())
        )


class Farewell(NamedTuple):
    """How a server closed a WebSocket; code 0 if it did so without a word."""

    code: int
    reason: str


class BareClient:
    """A WebSocket that says what it is told to, and reads only when it is told to.

    While it does not read it answers no ping, so that to its server it is a client that vanished.

    Args:
        process: Whom to connect to.
        receive_buffer: Bytes that its kernel takes while it does not read; by default, many.
    """

    def __init__(self, process: Process, *, receive_buffer: int | None = None) -> None:
        self._websocket = websocket.create_connection(
            f"{process.url.replace('http', 'ws', 1)}/socket.io/?EIO=4&transport=websocket",
            timeout=TIMEOUT,
            sockopt=[(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)]
            if receive_buffer
            else [],
        )
        self.send('40{"name": "Check"}')
        # Source: Socket.IO protocol v5, "CONNECT": 4 is an Engine.IO message, 0 the packet type.
        self.sid: str = json.loads(self.read("40")[2:])["sid"]
        self.send(f'420["join", "{PIT}"]')
        self.read("430")

    def send(self, text: str | bytes) -> None:
        """Send a text message as it is."""
        self._websocket.send(text)

    def read(self, prefix: str) -> str:
        """Return the next message that begins with *prefix*; skip others, but answer pings."""
        while not (text := str(self._websocket.recv())).startswith(prefix):
            if text == "2":
                self.send("3")
        return text

    def read_acknowledgement(self) -> Any:
        """Return what the next acknowledgement says."""
        text = self.read("43")
        return json.loads(text[text.index("[") :])[0]

    def read_farewell(self) -> Farewell:
        """Read to the end of the connection."""
        with suppress(websocket.WebSocketConnectionClosedException, OSError):
            while True:
                frame = self._websocket.recv_frame()
                if frame.opcode == websocket.ABNF.OPCODE_CLOSE:
                    (code,) = struct.unpack("!H", frame.data[:2])
                    return Farewell(code, frame.data[2:].decode())
        return Farewell(0, "")

    def close(self) -> None:
        """End the connection without a word."""
        self._websocket.shutdown()
