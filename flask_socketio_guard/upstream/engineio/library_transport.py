"""A WebSocket underneath an Engine.IO socket, left to ``simple-websocket``: under threads."""

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
_PIECE = 64 * 1024  # bytes that are sent at once, between two looks at the progress
_LOOK_INTERVAL = 2.0  # seconds
_MAX_READ_AHEAD = 256  # messages
_MAX_READ_AHEAD_BYTES = 256 * 1024


class _ThrottledSocket:
    """The socket of a simple-websocket, which has a thread that reads on whoever takes it.

    What it has read has no bound. Here the thread waits until that was taken.

    Args:
        websocket: A server of simple-websocket.
        on_sent: Called while a large message is sent, whenever the client has taken more of it.
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
        """Read, as soon as little enough waits to be taken."""
        while self._websocket.connected and not self._is_over and self._is_ahead():
            self._is_waiting = True
            self._taken.clear()
            if self._is_ahead():
                self._taken.wait(_LOOK_INTERVAL)
        self._is_waiting = False
        data: bytes = self._sock.recv(size)
        return data

    def send(self, data: bytes) -> int:
        """Send all of *data*, and nothing of another thread in the middle of it: pongs come so."""
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
        """Note that nothing will be taken any more."""
        self._is_over = True
        self._taken.set()

    def taken(self) -> None:
        """Note that a message was taken."""
        if self._is_waiting:
            self._taken.set()

    def _is_ahead(self) -> bool:
        messages = self._websocket.input_buffer
        return len(messages) >= _MAX_READ_AHEAD or sum(map(len, messages)) >= _MAX_READ_AHEAD_BYTES


class LibraryTransport:
    """A WebSocket that simple-websocket speaks; under threads.

    Args:
        websocket: Engine.IO's wrapper of it.
        queue: What waits to be sent.
        guard: For its runtime and books.
        lock: Of the queue.
        max_size: Largest message taken, in characters or bytes.
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
        """Whether it has been ended."""
        return self._is_over

    def receive(self) -> Iterable[str | bytes] | None:
        """Wait for a message; see :class:`WebSocketTransport`."""
        data = None
        try:
            while data is None:
                # The library wakes who waits for a message before it notes that there will
                # be none, where it refuses what the client sent.
                data = self._websocket.ws.receive(timeout=_LOOK_INTERVAL)
        except Exception:  # noqa: BLE001 - whatever it was, this connection is at its end
            return None
        self._throttled.taken()
        if len(data) > self._max_size:
            self._guard.telemetry.send(Violation("size", f"{len(data)} > {self._max_size}"))
            self.close(CloseCode.MESSAGE_TOO_BIG, "message too big")
            return None
        return (data if isinstance(data, str) else bytes(data),)

    def pay(self, size: int) -> None:
        """Do nothing: threads take turns by themselves."""

    def send_at_once(self, text: str) -> None:
        """Send a message past the queue; see :class:`WebSocketTransport`."""
        self._websocket.send(text)

    def start(self) -> None:
        """Begin to send what waits in the queue, in a thread of its own."""
        self._guard.runtime.spawn(self._write, name="socketio-guard:writer")

    def wake(self) -> None:
        """Wake the writer."""
        self._work.set()

    def write_now(self, frames: bytes) -> bool:
        """Leave it to the writer: to send may mean to wait."""
        del frames
        return False

    def flush(self) -> None:
        """Do nothing: the writer is never far."""

    def close(self, code: int, reason: str) -> None:
        """Send what waits, then a close frame; see :class:`WebSocketTransport`."""
        self._farewell = (code, reason)
        self._guard.deadlines.call_later(self._guard.config.close_timeout, self.abort)
        self.wake()

    def leave(self) -> None:
        """Do nothing: simple-websocket leaves by itself."""

    def abort(self) -> None:
        """End it now."""
        self._is_over = True
        self._throttled.end()
        self.wake()
        with contextlib.suppress(OSError):
            self._websocket.ws.sock.shutdown(sockets.SHUT_RDWR)

    def forsake(self) -> None:
        """Have no part of it; see :class:`WebSocketTransport`.

        The threads behind it are the parent's, too.
        """
        self._is_over = True
        silence(self._websocket.ws.sock)

    def _write(self) -> None:
        try:
            while not self._is_over:
                self._work.clear()
                farewell = self._farewell  # what is sent before it is put before it
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
        except Exception:  # noqa: BLE001 - the connection broke; the reader sees that too
            self.abort()
