"""The transport for threaded servers, where ``simple-websocket`` implements the WebSocket."""

from __future__ import annotations

import contextlib
import socket as sockets
import threading
from typing import TYPE_CHECKING, Any

from websockets.frames import CloseCode

from ...core.runtime import silence
from ...telemetry.records import Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ...clients.send_queue import SendQueue
    from ...ports import Ports

_BATCH_BYTES = 256 * 1024
_PIECE = 64 * 1024  # bytes per send call; progress is recorded after each
_CHECK_INTERVAL = 2.0  # seconds
_MAX_READ_AHEAD = 256  # messages
_MAX_READ_AHEAD_BYTES = 256 * 1024


class _ThrottledSocket:
    """Applies backpressure to the reader thread of simple-websocket.

    That thread reads into an unbounded buffer, whether or not anything consumes it. With this
    socket it waits until earlier messages have been consumed.

    Args:
        websocket: A ``simple_websocket.Server``.
        on_sent: Called after each piece of a large message that the client has accepted.
    """

    def __init__(self, websocket: Any, on_sent: Callable[[], object]) -> None:
        self._websocket = websocket
        self._on_sent = on_sent
        self._sending = threading.Lock()
        self._sock = websocket.sock
        self._taken = threading.Event()
        self._is_waiting = False
        self._is_over = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv(self, size: int) -> bytes:
        """Read up to *size* bytes once the buffer of unread messages is below its bounds."""
        while self._websocket.connected and not self._is_over and self._is_ahead():
            self._is_waiting = True
            self._taken.clear()
            if self._is_ahead():
                self._taken.wait(_CHECK_INTERVAL)
        self._is_waiting = False
        data: bytes = self._sock.recv(size)
        return data

    def send(self, data: bytes) -> int:
        """Send all of *data* under a lock: the reader thread sends pongs on the same socket."""
        size = len(data)
        with self._sending:
            if size <= _PIECE:
                self._sock.sendall(data)
                return size
            rest = memoryview(data)
            while rest:
                rest = rest[self._sock.send(rest[:_PIECE]) :]
                self._on_sent()
        return size

    def end(self) -> None:
        """Release the reader thread: nothing will consume its messages any more."""
        self._is_over = True
        self._taken.set()

    def taken(self) -> None:
        """Wake the reader thread after a message was consumed."""
        if self._is_waiting:
            self._taken.set()

    def _is_ahead(self) -> bool:
        messages = self._websocket.input_buffer
        return len(messages) >= _MAX_READ_AHEAD or sum(map(len, messages)) >= _MAX_READ_AHEAD_BYTES


class LibraryTransport:
    """A WebSocket implemented by simple-websocket, for threaded servers.

    Args:
        websocket: Engine.IO's wrapper of the WebSocket.
        queue: Messages that wait to be sent.
        guard: Gives access to the runtime, the deadlines, the settings and the telemetry.
        lock: Protects *queue*.
        max_size: Largest message accepted, in characters of text or bytes.
    """

    def __init__(
        self, websocket: Any, queue: SendQueue, guard: Ports, *, lock: Any, max_size: int
    ) -> None:
        self.is_stuck = False
        self.is_leaving = False
        self._websocket = websocket
        self._throttled = websocket.ws.sock = _ThrottledSocket(
            websocket.ws, on_sent=queue.progressed
        )
        self._queue = queue
        self._guard = guard
        self._lock = lock
        self._max_size = max_size
        self._work = guard.flag()
        self._farewell: tuple[int, str] | None = None
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether the connection has been aborted."""
        return self._is_over

    def receive(self) -> Iterable[str | bytes] | None:
        """Wait for a message; see :class:`WebSocketTransport`."""
        data = None
        try:
            while data is None:
                # If the library rejects a frame, it wakes the waiting reader before it marks
                # the connection as closed, so a receive without a timeout would hang.
                data = self._websocket.ws.receive(timeout=_CHECK_INTERVAL)
        except Exception:  # noqa: BLE001 - any error ends this connection
            return None
        self._throttled.taken()
        if len(data) > self._max_size:
            self._guard.telemetry.send(Violation("size", f"{len(data)} > {self._max_size}"))
            self.close(CloseCode.MESSAGE_TOO_BIG, "message too big")
            return None
        return (data if isinstance(data, str) else bytes(data),)

    def pay(self, size: int) -> None:
        """Do nothing: the operating system schedules threads."""

    def send_at_once(self, text: str) -> None:
        """Send a message ahead of the queue; see :class:`WebSocketTransport`."""
        self._websocket.send(text)

    def start(self) -> None:
        """Start the thread that sends the queued messages."""
        self._guard.runtime.spawn(self._write, name="socketio-guard:writer")

    def wake(self) -> None:
        """Wake the writer thread."""
        self._work.set()

    def write_now(self, frames: bytes) -> bool:
        """Return False, which leaves *frames* to the writer thread: sending may block."""
        del frames
        return False

    def flush(self) -> None:
        """Do nothing: the writer thread runs independently of the caller."""

    def close(self, code: int, reason: str) -> None:
        """Send the queued messages, then a close frame; see :class:`WebSocketTransport`."""
        self._farewell = (code, reason)
        self._guard.deadlines.call_later(self._guard.config.close_timeout, self.abort)
        self.wake()

    def leave(self) -> None:
        """Do nothing: simple-websocket closes its own socket."""

    def abort(self) -> None:
        """Shut the socket down and end both threads, without a close frame."""
        self._is_over = True
        self._throttled.end()
        self.wake()
        with contextlib.suppress(OSError):
            self._websocket.ws.sock.shutdown(sockets.SHUT_RDWR)

    def forsake(self) -> None:
        """Disown the connection in a forked child; see :class:`WebSocketTransport`.

        Its threads exist only in the parent.
        """
        self._is_over = True
        silence(self._websocket.ws.sock)

    def _write(self) -> None:
        try:
            while not self._is_over:
                self._work.clear()
                farewell = self._farewell  # read first: messages queued before it go out before it
                with self._lock:
                    items: list[Any] = self._queue.take(_BATCH_BYTES)
                self.is_stuck = bool(items)
                for item in items:
                    for data in item.plain():
                        self._websocket.send(data)
                        self._queue.progressed()
                self.is_stuck = False
                if not items:
                    if farewell is not None:
                        self._websocket.ws.close(*farewell)
                        return
                    self._work.wait()
        except Exception:  # noqa: BLE001 - the connection broke; the reader notices as well
            self.abort()
