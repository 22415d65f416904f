"""WebSocket transports of an Engine.IO socket: they read, write and close.

Under gevent, :class:`ProtocolTransport` runs the sans-I/O protocol of ``websockets`` on the raw
socket. Threaded servers use :class:`~.library_transport.LibraryTransport`.
"""

from __future__ import annotations

import contextlib
import logging
import socket as sockets
from typing import TYPE_CHECKING, Any, Protocol

from websockets.exceptions import PayloadTooBig
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import SERVER, State
from websockets.protocol import Protocol as WebSocketProtocol

from ...core.runtime import TIME_SLICE, clock, silence
from ...telemetry.records import Violation
from .websocket import close_frame, cut_reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...clients.send_queue import SendQueue
    from ...ports import Ports
    from .websocket import RawSocket

_BUFFER = 65536
_BATCH_BYTES = 256 * 1024
_PIECE = 64 * 1024  # bytes per send over TLS, which returns only once all of them are sent
_MAX_FRAGMENTS = 4096
_FIRST_SLICE = 2048  # bytes that are parsed at once, to begin with
_MIN_SLICE = 256
_COMPRESSED_SLICE = 2048  # may inflate to two megabytes
_TURN = 16  # frames of one client before control is yielded
_BYTES_PER_FRAME = 4096  # a message counts as one more frame for each
_RECV_WEIGHT = 4  # a read from the socket counts as so many frames
_MAX_ANSWERS = 8
_POLL_INTERVAL = 0.01  # seconds
_LOOK_INTERVAL = 2.0  # seconds

# A separate logger at WARNING, because the library logs the end of each connection.
_logger = logging.getLogger("flask_socketio_guard.websocket")
_logger.setLevel(logging.WARNING)


class WebSocketTransport(Protocol):
    """The WebSocket of one client."""

    is_stuck: bool
    """Whether the client does not read what is written to it."""
    is_leaving: bool
    """Whether the protocol has closed the connection and the client must still read the rest."""

    @property
    def is_over(self) -> bool:
        """Whether the connection has been aborted."""

    def receive(self) -> Iterable[str | bytes] | None:
        """Wait for messages; return ``None`` at the end of the connection."""

    def pay(self, size: int) -> None:
        """Account for a message that was handled, and yield control when a time slice is used up.

        Args:
            size: Length of the message in characters or bytes, after decompression.
        """

    def send_at_once(self, text: str) -> None:
        """Send a message ahead of the queue; only before :meth:`start`."""

    def start(self) -> None:
        """Begin to send the queued messages."""

    def wake(self) -> None:
        """Schedule a write of the queued messages; does not block."""

    def write_now(self, frames: bytes) -> bool:
        """Send *frames* if nothing is queued before them and the call need not block.

        Returns:
            Whether they were sent. If not, the caller must queue the messages.
        """

    def flush(self) -> None:
        """Send as many of the queued messages as possible without blocking."""

    def close(self, code: int, reason: str) -> None:
        """Send the queued messages, then a close frame; does not block."""

    def leave(self) -> None:
        """Wait, up to the close timeout, for the client to read the close frame."""

    def abort(self) -> None:
        """End the connection without a close frame; does not block."""

    def forsake(self) -> None:
        """Disown the connection in a forked child, without any effect on the parent's."""


class ProtocolTransport:
    """A WebSocket on a raw gevent socket.

    It has no writer task. Queued messages are written in the next iteration of the event loop,
    for all connections in one batch; a task is started only to wait for a client that does not
    read fast enough.

    Args:
        raw: The socket, after the handshake.
        queue: Messages that wait to be sent.
        guard: Gives access to the settings, the runtime and the telemetry.
        max_size: Largest message accepted, in bytes.
    """

    def __init__(self, raw: RawSocket, queue: SendQueue, guard: Ports, *, max_size: int) -> None:
        self.is_stuck = False
        self.is_leaving = False
        self._sock = raw.sock
        # gevent's wrapper handles timeouts, which a non-blocking send does not need.
        self._send = getattr(raw.sock, "_sock", raw.sock).send
        self._read = raw.read_first
        self._queue = queue
        self._guard = guard
        self._flusher = guard.write_batcher
        self._is_eager = not guard.config.fast
        self._protocol = WebSocketProtocol(SERVER, max_size=max_size, logger=_logger)
        self._protocol.extensions = raw.extensions
        # TLS may have to read before it can write, so it cannot be written to without blocking.
        self._can_flush = not hasattr(raw.sock, "_sslobj")
        self._is_started = False
        self._is_direct = False
        self._is_due = False
        self._is_over = False
        self._rest: memoryview | bytes = b""
        self._control: list[bytes] = []
        self._farewell: bytes | None = None
        self._parts: list[bytes] = []
        self._is_text = False
        self._unparsed = b""
        self._slice = _FIRST_SLICE
        self._max_slice = _COMPRESSED_SLICE if raw.extensions else _BUFFER
        self._turn = 0.0
        self._turn_ends_at = 0.0
        self._weight = 0

    # Reading

    @property
    def is_over(self) -> bool:
        """Whether the connection has been aborted."""
        return self._is_over

    def receive(self) -> Iterable[str | bytes] | None:
        """Wait for messages; see :class:`WebSocketTransport`."""
        protocol = self._protocol
        while not self._has_ended():
            data = self._unparsed or self._recv()
            if not data:
                protocol.receive_eof()
                return None
            protocol.receive_data(data[: self._slice])
            self._unparsed = data[self._slice :]
            frames = protocol.events_received()
            # A buffer may hold thousands of tiny frames, or only a part of a large one.
            if len(frames) > _TURN:
                self._slice = _MIN_SLICE
            elif len(frames) <= 1:
                self._slice = min(2 * self._slice, self._max_slice)
            messages = self._messages(frames)
            answers = protocol.data_to_send()
            if answers:
                self._answer(answers)
            if messages:
                return messages
        return None

    def _has_ended(self) -> bool:
        """Return whether anything that the client still sends can be ignored."""
        protocol = self._protocol
        if protocol.state is State.OPEN:
            return False
        self.is_leaving = protocol.close_expected() and self._farewell is None
        self._is_direct = False
        return self.is_leaving or protocol.eof_sent

    def _recv(self) -> bytes:
        self._yield_if_due(_RECV_WEIGHT)
        try:
            data = self._read(_BUFFER)
        except (OSError, ValueError):  # ValueError: the buffered file is closed
            return b""
        self._read = self._sock.recv
        return data

    def pay(self, size: int) -> None:
        """Account for a message that was handled; see :class:`WebSocketTransport`."""
        if size >= _BYTES_PER_FRAME or clock() >= self._turn_ends_at:
            self._yield_if_due(size // _BYTES_PER_FRAME)

    def _yield_if_due(self, weight: int) -> None:
        """Yield control once a time slice is used up, even if the client keeps on sending."""
        turn = self._guard.runtime.loop_iteration()
        now = clock()
        if turn != self._turn:
            self._turn = turn
            self._turn_ends_at = now + TIME_SLICE
            self._weight = 0
        self._weight += weight
        if self._weight >= _TURN or now >= self._turn_ends_at:
            self._guard.runtime.yield_control()

    def _messages(self, frames: list[Any]) -> list[str | bytes]:
        messages: list[str | bytes] = []
        self._yield_if_due(len(frames))
        try:
            for frame in frames:
                opcode = frame.opcode
                if opcode is Opcode.TEXT or opcode is Opcode.BINARY:
                    if frame.fin:
                        text = opcode is Opcode.TEXT
                        messages.append(str(frame.data, "utf-8") if text else bytes(frame.data))
                        continue
                    self._is_text = opcode is Opcode.TEXT
                    self._parts = [frame.data]
                elif opcode is Opcode.CONT:
                    self._parts.append(frame.data)
                    if frame.fin:
                        whole = b"".join(self._parts)
                        self._parts = []
                        messages.append(whole.decode() if self._is_text else whole)
                    elif len(self._parts) > _MAX_FRAGMENTS:
                        self._fail(CloseCode.POLICY_VIOLATION, "too many fragments")
                        break
        except UnicodeDecodeError:
            self._fail(CloseCode.INVALID_DATA, "invalid UTF-8")
        return messages

    def _fail(self, code: CloseCode, reason: str) -> None:
        if self._protocol.state is State.OPEN:
            self._protocol.fail(code, reason)
            self._guard.telemetry.send(Violation("websocket", reason))

    def _answer(self, answers: list[bytes]) -> None:
        """Send what the protocol itself produces: pongs and close frames."""
        error = self._protocol.parser_exc
        if error is not None and not isinstance(error, EOFError):
            reason = "size" if isinstance(error, PayloadTooBig) else "websocket"
            self._guard.telemetry.send(Violation(reason, str(error)[:200]))
        # Only the most recent pings need a pong (RFC 6455, section 5.5.3), so a client that
        # sends pings and does not read cannot use up memory.
        self._control = [*self._control, *filter(None, answers)][-_MAX_ANSWERS:]
        self.wake()

    def leave(self) -> None:
        """Let the client read the close frame before the connection is closed.

        Unread data would make TCP reset the connection and discard the close frame. Therefore
        data is read, and ignored, up to the close timeout.
        """
        self._discard_queue()
        self.flush()
        deadline = self._guard.deadlines.call_later(self._guard.config.close_timeout, self.abort)
        while self.is_stuck and not self._is_over:
            self._guard.runtime.sleep(_POLL_INTERVAL)
        with contextlib.suppress(OSError):
            self._sock.shutdown(sockets.SHUT_WR)
            while self._sock.recv(_BUFFER):
                self._yield_if_due(_RECV_WEIGHT)
        deadline.cancel()

    # Writing

    def send_at_once(self, text: str) -> None:
        """Send a message ahead of the queue; see :class:`WebSocketTransport`."""
        self._control.append(Frame(Opcode.TEXT, text.encode()).serialize(mask=False))
        self.wake()

    def start(self) -> None:
        """Begin to send the queued messages."""
        self._is_started = True
        # Compression has a state for each client, so frames cannot be shared.
        self._is_direct = self._can_flush and not self._protocol.extensions
        self.wake()

    def wake(self) -> None:
        """Schedule a write for the next iteration of the event loop."""
        if not self._is_due and not self.is_stuck:
            self._is_due = True
            if self._is_eager:
                self.flush()
            else:
                self._flusher.add(self)

    def write_now(self, frames: bytes) -> bool:
        """Write *frames* if nothing is queued before them; see :class:`WebSocketTransport`."""
        # If anything is queued, a write is due or the client is stuck.
        if self._is_due or self.is_stuck or not self._is_direct:
            return False
        self._write(frames)
        return True

    def flush(self) -> None:
        """Write as much as the kernel accepts without blocking; a task writes the rest."""
        self._is_due = False
        if self.is_stuck or self._is_over:
            return
        if not self._can_flush:
            self._wait_for_room()
            return
        while data := self._take():
            if not self._write(data) or not (self._queue or self._farewell):
                return
            if self._protocol.extensions:  # compression is slow: one batch per loop iteration
                self._is_due = True
                self._flusher.add(self)
                return

    def _write(self, data: bytes) -> bool:
        """Write *data* without blocking, and return whether the kernel accepted all of it."""
        try:
            sent = self._send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.abort()
            return False
        if sent == len(data):
            return True
        self._rest = memoryview(data)[sent:]
        self._wait_for_room()
        return False

    def close(self, code: int, reason: str) -> None:
        """Send the queued messages, then a close frame; see :class:`WebSocketTransport`."""
        if self._farewell is not None or self._is_over or self.is_leaving:
            return
        reason = cut_reason(reason)
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(code, reason)
            self._protocol.data_to_send()
        self._farewell = close_frame(code, reason)
        self._is_direct = False
        self._guard.deadlines.call_later(self._guard.config.close_timeout, self._give_up)
        self.wake()

    def abort(self) -> None:
        """Shut the socket down, which ends all reads and writes; idempotent."""
        if not self._is_over:
            self._is_over = True
            self._is_direct = False
            self._discard_queue()
            with contextlib.suppress(OSError):
                self._sock.shutdown(sockets.SHUT_RDWR)

    def forsake(self) -> None:
        """Disown the connection in a forked child; see :class:`WebSocketTransport`."""
        self._is_over = True
        self._is_direct = False
        silence(self._sock)

    def _give_up(self) -> None:
        """Abort a connection whose client has not answered the close frame in time."""
        # If the event loop was blocked, this timer may fire before the queue was written.
        if self._is_due:
            self.flush()
        self.abort()

    def _discard_queue(self) -> None:
        """Discard the queue, unless the session continues over polling after a failed upgrade."""
        if self._is_started:
            self._queue.clear()

    def _take(self) -> bytes:
        """Return the bytes to write next, or ``b""``; the previous ones must have been sent."""
        if self._control:
            control, self._control = self._control, []
            return b"".join(control)
        if self._is_started and not self.is_leaving:
            items: list[Any] = self._queue.take(_BATCH_BYTES)
            if items:
                if self._protocol.extensions:
                    return b"".join(self._compressed(item) for item in items)
                if len(items) == 1:  # do not copy the frames of a broadcast for each recipient
                    frames: bytes = items[0].frames
                    return frames
                return b"".join([item.frames for item in items])
        if self._farewell:
            farewell, self._farewell = self._farewell, b""
            return farewell
        return b""

    def _compressed(self, item: Any) -> bytes:
        frames = []
        for data in item.plain():
            is_text = isinstance(data, str)
            frame = Frame(
                Opcode.TEXT if is_text else Opcode.BINARY, data.encode() if is_text else data
            )
            frames.append(frame.serialize(mask=False, extensions=self._protocol.extensions))
        return b"".join(frames)

    def _wait_for_room(self) -> None:
        self.is_stuck = True
        self._guard.runtime.start(self._push)

    def _push(self) -> None:
        """Write until nothing is left, however slowly the client reads; runs in its own task."""
        piece = None if self._can_flush else _PIECE  # TLS
        try:
            while not self._is_over:
                data, self._rest = self._rest or self._take(), b""
                if not data:
                    break
                rest = memoryview(data)
                while rest:
                    rest = rest[self._sock.send(rest[:piece]) :]
                    self._queue.progressed()
                if self._protocol.extensions:
                    self._guard.runtime.yield_control()
        except OSError:
            self.abort()
        finally:
            self.is_stuck = False
