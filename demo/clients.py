"""The clients of the check: a well-behaved one, and one that breaks the rules."""

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
    """One event of a stream, as one client received it. Instants are Unix time."""

    process: str
    pid: int
    number: int
    sent_at: float
    heard_at: float


class _OrderedEngineClient(engineio.Client):
    """Handles messages one after another.

    The standard client starts a thread for each, and may handle the second of two messages first.
    """

    def _trigger_event(self, event: str, *args: Any, **kwargs: Any) -> Any:
        return super()._trigger_event(event, *args, **{**kwargs, "run_async": False})


class OrderedClient(socketio.Client):
    """python-socketio's client, with events handled in order of arrival."""

    def _engineio_client_class(self) -> type[engineio.Client]:
        return _OrderedEngineClient


class Watcher:
    """A standard client that receives the streams and reconnects by itself."""

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
        """The current session id, with which a process can address this client."""
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
    """Close code and reason from a server; code 0 if the connection ended without a close frame."""

    code: int
    reason: str


class BareClient:
    """A WebSocket client that sends raw text, and reads only on request.

    While it does not read, it answers no pings, and so looks to the server like a client that
    vanished.

    Args:
        process: The process to connect to.
        receive_buffer: Size of the kernel's receive buffer in bytes; by default, the system's.
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
        """Send *text* unchanged."""
        self._websocket.send(text)

    def read(self, prefix: str) -> str:
        """Return the next message that starts with *prefix*; skip others, but answer pings."""
        while not (text := str(self._websocket.recv())).startswith(prefix):
            if text == "2":
                self.send("3")
        return text

    def read_acknowledgement(self) -> Any:
        """Return the first value of the next acknowledgement."""
        text = self.read("43")
        return json.loads(text[text.index("[") :])[0]

    def read_farewell(self) -> Farewell:
        """Read until the connection ends."""
        with suppress(websocket.WebSocketConnectionClosedException, OSError):
            while True:
                frame = self._websocket.recv_frame()
                if frame.opcode == websocket.ABNF.OPCODE_CLOSE:
                    (code,) = struct.unpack("!H", frame.data[:2])
                    return Farewell(code, frame.data[2:].decode())
        return Farewell(0, "")

    def close(self) -> None:
        """Close the connection without a close frame."""
        self._websocket.shutdown()
