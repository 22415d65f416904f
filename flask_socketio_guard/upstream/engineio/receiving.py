"""The receiving side of a guarded socket: packets, events, and backpressure on reading."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes

from engineio import packet as packets
from engineio.packet import Packet

from ...core.runtime import TIME_SLICE, clock
from ...events.dispatch import DispatchBounds, EventDispatcher
from ...events.pieces import TimeSlice
from ...telemetry.records import Violation
from .outgoing import ClientMessage
from .violations import ProtocolViolation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import WSGIEnvironment
    from engineio.socket import Socket as _Socket

    from ...clients.connections import Connection
    from ...core.runtime import Flag
    from ...events.dispatch import Work
    from .websocket_transport import WebSocketTransport
else:
    from engineio.socket import Socket as _Socket

_POST_PATIENCE = 4.0  # seconds; Engine.IO's Python client gives up a request after five
_CHECK_INTERVAL = 1.0  # seconds
_ANSWER_FACTOR: Final = 8
_TURN = 16  # packets of one request before control is yielded
BYTES_PER_PACKET = 4096  # a packet counts once more for each
_FORM = "d="  # start of a JSONP form
_MAX_FIELDS = 16
_ESCAPED = 4 * 1024  # characters of a form decoded at a time; a megabyte takes 70 ms
_SEPARATOR = "\x1e"
_MESSAGE = str(packets.MESSAGE)
_BASE64 = "b"
_CONTROL = 64  # characters
NOOP = ClientMessage.of_engineio(Packet(packets.NOOP))
"""Shared by all clients, so that it is encoded only once."""


class Receiving(_Socket):
    """The receiving side of a guarded socket."""

    _dispatcher: EventDispatcher | None
    _room: Flag | None
    """Set when there may be room for more events; ``None`` unless reading is suspended."""
    _is_read_to_end: bool

    def receive(self, pkt: Any) -> None:
        """Handle one Engine.IO packet from the client.

        Raises:
            ProtocolViolation: A client must not send packets of this type.
        """
        kind = pkt.packet_type
        if kind == packets.MESSAGE:
            self._take_message(pkt.data)
            return
        self._is_heard = True
        if kind == packets.PONG:
            self._pong()
        elif kind == packets.CLOSE:
            self.close(abort=True, reason=self.server.reason.CLIENT_DISCONNECT)
        elif kind == packets.UPGRADE:
            self.put(NOOP)
        elif kind != packets.NOOP:
            raise ProtocolViolation("packet", f"an Engine.IO packet of type {kind}")

    def _take_message(self, data: Any) -> None:
        self._is_heard = True
        self.server.handlers["message"](self.sid, data)

    def submit(
        self, work: Work, message: str | bytes, *, more_bytes: int = 0, is_early: bool = False
    ) -> None:
        """Run or queue an event of the client; see :meth:`EventDispatcher.submit`."""
        dispatcher = self._dispatcher or self._new_dispatcher()
        dispatcher.submit(work, message, more_bytes=more_bytes, is_early=is_early)

    @property
    def has_waiting(self) -> bool:
        """Whether events of the client are queued or running."""
        dispatcher = self._dispatcher
        return dispatcher is not None and bool(dispatcher.waiting or dispatcher.running)

    def release(self, connection: Connection) -> None:
        """Run the events that arrived before *connection* was accepted."""
        if self._dispatcher is not None:
            self._dispatcher.release(connection)

    def drop(self, connection: Connection) -> None:
        """Discard the queued events of *connection*."""
        if self._dispatcher is not None:
            self._dispatcher.drop(connection)

    def _new_dispatcher(self) -> EventDispatcher:
        config, runtime = self._guard.config, self._guard.runtime
        with self._lock:
            if self._dispatcher is None:
                self._dispatcher = EventDispatcher(
                    DispatchBounds(
                        config.max_in_flight, config.max_waiting_bytes, config.max_in_flight_bytes
                    ),
                    spawn=self.server.spawn_event or partial(runtime.start, owner=self.sid),
                    spawn_later=partial(runtime.call_later, 0.0),
                    lock=self._lock,
                )
            return self._dispatcher

    # Backpressure

    def _wait_for_room(
        self, give_up_at: float | None = None, transport: WebSocketTransport | None = None
    ) -> None:
        """Block the reader while too many of the client's events are queued.

        The acknowledgement that a running handler waits for may arrive behind them. While the
        client owes one, reading continues up to a larger bound.

        Args:
            give_up_at: For a polling request: the time at which it stops waiting, if the
                queued events are below the larger bound.
            transport: For a WebSocket: the transport that is read.
        """
        dispatcher = self._dispatcher
        if dispatcher is None or not self._is_over(dispatcher) or self._is_read_to_end:
            return
        if self._room is not None:
            # Source: Engine.IO, "data request overlap": a client sends one request at a time.
            raise ProtocolViolation("payload", "requests at a time, while its events wait")
        room = self._room = self._guard.flag()
        dispatcher.on_room = room.set
        config = self._guard.config
        stopped_at = clock()
        try:
            while self._is_over(dispatcher) and not self.closed:
                if give_up_at is not None:
                    is_below = dispatcher.size < _ANSWER_FACTOR * config.max_waiting_bytes
                    if is_below and clock() >= give_up_at:
                        break
                elif (
                    transport is not None
                    and transport.is_over
                    and clock() >= stopped_at + config.departure_timeout
                ):
                    self._is_read_to_end = True  # only the kernel's buffer is left, and it is small
                    break
                room.wait(_CHECK_INTERVAL)
                room.clear()
        finally:
            dispatcher.on_room = None
            self._room = None
            self._is_heard = True  # the silence while nothing was read was not the client's

    def _is_over(self, dispatcher: EventDispatcher) -> bool:
        bound = self._guard.config.max_waiting_bytes
        if dispatcher.size < bound:
            return False
        return dispatcher.size >= _ANSWER_FACTOR * bound or not self._owes_answer()

    def _owes_answer(self) -> bool:
        guard = self._guard
        connections = guard.connections.of(self.sid)
        return any(guard.callbacks.is_owed_by(connection.sid) for connection in connections)

    def recheck_room(self) -> None:
        """Let a suspended reader check again: the client now owes an acknowledgement."""
        if self._room is not None:
            self._room.set()

    # Requests

    def handle_post_request(self, environ: WSGIEnvironment) -> None:
        """Handle the packets of a polling request.

        Raises:
            EngineIOError: The payload is too large or malformed. The response is then 400
                and the session is closed.
        """
        give_up_at = clock() + _POST_PATIENCE
        try:
            weight, until = 0, clock() + TIME_SLICE
            for message in _packets_in(self._payload(environ)):
                if self.closed:
                    return
                self._act_on(message, "payload")
                if self._dispatcher is not None and self._dispatcher.is_full:
                    self._wait_for_room(give_up_at)
                weight += 1 + len(message) // BYTES_PER_PACKET
                if weight >= _TURN or clock() >= until:
                    self._guard.runtime.yield_control()
                    weight, until = 0, clock() + TIME_SLICE
        except ProtocolViolation as exc:
            self.violated(exc)
            raise

    def _payload(self, environ: WSGIEnvironment) -> str:
        try:
            length = int(environ.get("CONTENT_LENGTH") or 0)
        except ValueError as exc:
            raise ProtocolViolation("payload", "Content-Length is not a number") from exc
        if not 0 <= length <= self.server.max_http_buffer_size:
            raise ProtocolViolation("size", f"a payload of {length} bytes")
        try:
            body: str = environ["wsgi.input"].read(length).decode()
        except Exception as exc:
            raise ProtocolViolation("payload", str(exc)) from exc
        if not body.startswith(_FORM):
            return body
        return _form_value(body, TimeSlice(self.server.line.pause).check)

    def _act_on(self, message: str | bytes, source: str) -> None:
        if isinstance(message, str) and message[:1] == _MESSAGE and message[1:2].isdigit():
            # The common case. Upstream's packet class would detect it through an exception.
            self._take_message(message[1:])
        else:
            self.receive(_decoded(message, source))

    def violated(self, violation: ProtocolViolation) -> None:
        """Close the session of a client that broke the protocol."""
        self._guard.telemetry.send(Violation(violation.reason, violation.detail))
        self.close(
            reason=self.server.reason.TRANSPORT_ERROR,
            code=violation.code,
            text=violation.text,
        )


def _packets_in(payload: str) -> Iterator[str]:
    """Yield the packets of a payload one by one, as there may be half a million of them.

    Upstream accepts sixteen and drops the whole payload if there are more; a browser that was
    offline sends everything that it has buffered in one request.
    """
    start, end = 0, 0
    while payload and end >= 0:
        end = payload.find(_SEPARATOR, start)
        yield payload[start:] if end < 0 else payload[start:end]
        start = end + 1


def _form_value(body: str, take_turn: Callable[[], object]) -> str:
    """Return the value of the first field of a form, as JSONP sends it.

    Args:
        body: The body of the request.
        take_turn: Called regularly to yield control.

    Raises:
        ProtocolViolation: The field is empty, or there are too many others.

    Source:
        WHATWG URL standard, "application/x-www-form-urlencoded parsing".
    """
    text = body[len(_FORM) :].partition("&")[0]
    if not text or body.count("&") >= _MAX_FIELDS:
        raise ProtocolViolation("payload", "a form with no fields or too many")
    parts = []
    at = 0
    while at < len(text):
        take_turn()
        end = at + _ESCAPED
        escape = text.find("%", end - 2, end)  # do not split an escape, which has three characters
        end = end if escape < 0 else escape
        parts.append(unquote_to_bytes(text[at:end].replace("+", " ")))
        at = end
    return b"".join(parts).decode(errors="replace")


def _decoded(message: str | bytes, source: str) -> Any:
    """Return the Engine.IO packet for a message that is not Socket.IO text.

    Raises:
        ProtocolViolation: It cannot be decoded, or it is a text message without a packet type.
    """
    if isinstance(message, str):
        if message.startswith(_MESSAGE):
            raise ProtocolViolation("packet", "not a Socket.IO packet: it has no type")
        if not message.startswith(_BASE64):
            # Upstream decodes JSON here, but the data of a ping or pong is never used.
            message = message[:_CONTROL]
    try:
        return Packet(encoded_packet=message)
    except Exception as exc:
        raise ProtocolViolation(source, f"not an Engine.IO packet: {exc}") from exc
