"""WebSockets underneath an Engine.IO socket: frames in, frames out, and an end.

:class:`ProtocolTransport` runs the sans-I/O protocol of ``websockets`` on the raw socket,
under gevent; under threads there is :class:`~.library_transport.LibraryTransport`.
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
_PIECE = 64 * 1024  # of what is sent by who says nothing before all of it is taken
_MAX_FRAGMENTS = 4096
_FIRST_SLICE = 2048  # bytes that are parsed in one go
_MIN_SLICE = 256
_COMPRESSED_SLICE = 2048  # may become two megabytes
_TURN = 16  # frames of one client before others have their turn
_BYTES_PER_FRAME = 4096  # of a message, that count as one more
_RECV_WEIGHT = 4  # what one piece off the socket counts, in frames
_MAX_ANSWERS = 8
_POLL_INTERVAL = 0.01  # seconds
_LOOK_INTERVAL = 2.0  # seconds

# Its own, and quiet: the library tells of the end of each connection.
_logger = logging.getLogger("flask_socketio_guard.websocket")
_logger.setLevel(logging.WARNING)


class WebSocketTransport(Protocol):
    """A WebSocket of one client."""

    is_stuck: bool
    """Whether the client does not take what is written."""
    is_leaving: bool
    """Whether the protocol has ended it, and the last words are still to be read."""

    @property
    def is_over(self) -> bool:
        """Whether it has been ended."""

    def receive(self) -> Iterable[str | bytes] | None:
        """Wait for messages; ``None`` when there will be no more."""

    def pay(self, size: int) -> None:
        """Note that a message was acted upon; lets others have their turn when it is time.

        Args:
            size: Its length, in characters or bytes, once it is inflated.
        """

    def send_at_once(self, text: str) -> None:
        """Send a message past the queue; for the time before :meth:`start`."""

    def start(self) -> None:
        """Begin to send what waits in the queue."""

    def wake(self) -> None:
        """Send what has been put into the queue; does not wait."""

    def write_now(self, frames: bytes) -> bool:
        """Send *frames* if nothing waits before them, and that needs no waiting.

        Returns:
            Whether they are on their way; if not, the queue is for them.
        """

    def flush(self) -> None:
        """Send it now, as far as that needs no waiting."""

    def close(self, code: int, reason: str) -> None:
        """Send what waits, then a close frame; does not wait."""

    def leave(self) -> None:
        """Wait for the client to read the last words, for a while."""

    def abort(self) -> None:
        """End it now; does not wait."""

    def forsake(self) -> None:
        """Have no part of it, in a forked child, and do nothing to it: it is the parent's."""


class ProtocolTransport:
    """A WebSocket on a raw gevent socket.

    There is no task that writes: what waits is written in the next turn of the
    event loop, for all connections in one go, and only a client that does not
    take it gets a task that waits for it.

    Args:
        raw: The socket, after the handshake.
        queue: What waits to be sent.
        guard: For its settings, runtime and books.
        max_size: Largest message taken, in bytes.
    """

    def __init__(self, raw: RawSocket, queue: SendQueue, guard: Ports, *, max_size: int) -> None:
        self.is_stuck = False
        self.is_leaving = False
        self._sock = raw.sock
        # gevent's way around it looks at timeouts, which matter to those who wait.
        self._send = getattr(raw.sock, "_sock", raw.sock).send
        self._read = raw.read_first
        self._queue = queue
        self._guard = guard
        self._flusher = guard.write_batcher
        self._is_eager = not guard.config.fast
        self._protocol = WebSocketProtocol(SERVER, max_size=max_size, logger=_logger)
        self._protocol.extensions = raw.extensions
        # TLS may have to read before it can write, and so cannot be written to in passing.
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
        """Whether it has been ended."""
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
            # A buffer holds thousands of the smallest frames, or a part of a large one.
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
        """Say whether nothing that the client still sends is of any interest."""
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
        except (OSError, ValueError):  # the latter from a buffered file that is closed
            return b""
        self._read = self._sock.recv
        return data

    def pay(self, size: int) -> None:
        """Note that a message was acted upon; see :class:`WebSocketTransport`."""
        if size >= _BYTES_PER_FRAME or clock() >= self._turn_ends_at:
            self._yield_if_due(size // _BYTES_PER_FRAME)

    def _yield_if_due(self, weight: int) -> None:
        """Let others have their turn, now and then: a client may always have something to say."""
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
        """Write what the protocol answers by itself: pongs, and its part of a close."""
        error = self._protocol.parser_exc
        if error is not None and not isinstance(error, EOFError):
            reason = "size" if isinstance(error, PayloadTooBig) else "websocket"
            self._guard.telemetry.send(Violation(reason, str(error)[:200]))
        # Answers to the newest pings will do (RFC 6455, section 5.5.3), and so a
        # client that pings and does not read holds no memory.
        self._control = [*self._control, *filter(None, answers)][-_MAX_ANSWERS:]
        self.wake()

    def leave(self) -> None:
        """Let the client read the last words before the connection is gone.

        What it has sent and nobody reads would make TCP reset the connection,
        and with that throw away the close frame: so it is read, for a while.
        """
        self._let_go()
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
        """Send a message past the queue; see :class:`WebSocketTransport`."""
        self._control.append(Frame(Opcode.TEXT, text.encode()).serialize(mask=False))
        self.wake()

    def start(self) -> None:
        """Begin to send what waits in the queue."""
        self._is_started = True
        # Each client's compression has a state of its own.
        self._is_direct = self._can_flush and not self._protocol.extensions
        self.wake()

    def wake(self) -> None:
        """Have it written in the next turn of the event loop."""
        if not self._is_due and not self.is_stuck:
            self._is_due = True
            if self._is_eager:
                self.flush()
            else:
                self._flusher.add(self)

    def write_now(self, frames: bytes) -> bool:
        """Write *frames*, past the queue, if nothing waits; see :class:`WebSocketTransport`."""
        # Where anything waits in the queue, it is due or somebody is stuck with it.
        if self._is_due or self.is_stuck or not self._is_direct:
            return False
        self._write(frames)
        return True

    def flush(self) -> None:
        """Write what the kernel takes without waiting; the rest gets a task."""
        self._is_due = False
        if self.is_stuck or self._is_over:
            return
        if not self._can_flush:
            self._wait_for_room()
            return
        while data := self._take():
            if not self._write(data) or not (self._queue or self._farewell):
                return
            if self._protocol.extensions:  # to compress takes time, which others want, too
                self._is_due = True
                self._flusher.add(self)
                return

    def _write(self, data: bytes) -> bool:
        """Write without waiting what the kernel takes; say whether that was all."""
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
        """Send what waits, then a close frame; see :class:`WebSocketTransport`."""
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
        """End it now: whoever reads or writes finds it closed."""
        if not self._is_over:
            self._is_over = True
            self._is_direct = False
            self._let_go()
            with contextlib.suppress(OSError):
                self._sock.shutdown(sockets.SHUT_RDWR)

    def forsake(self) -> None:
        """Have no part of it; see :class:`WebSocketTransport`."""
        self._is_over = True
        self._is_direct = False
        silence(self._sock)

    def _give_up(self) -> None:
        """End it, although the client has not answered the close frame."""
        # After a loop that stood still, this may be due before what waits was written.
        if self._is_due:
            self.flush()
        self.abort()

    def _let_go(self) -> None:
        """Give up what waits, unless the session goes on without this WebSocket."""
        if self._is_started:
            self._queue.clear()

    def _take(self) -> bytes:
        """Return what is to be written next, as one piece; the last one is done with."""
        if self._control:
            control, self._control = self._control, []
            return b"".join(control)
        if self._is_started and not self.is_leaving:
            items: list[Any] = self._queue.take(_BATCH_BYTES)
            if items:
                if self._protocol.extensions:
                    return b"".join(self._compressed(item) for item in items)
                if len(items) == 1:  # a broadcast's is not to be copied for each
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
        """Write while the client takes it, however slowly; in a task of its own."""
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
