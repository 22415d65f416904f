"""The guarded Engine.IO socket: one client's transport session, over polling or WebSocket."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote_to_bytes

import flask
from engineio import packet as packets
from engineio.exceptions import EngineIOError
from engineio.packet import Packet
from websockets.frames import CloseCode

from ...clients.send_queue import (
    BROADCAST_OVERFLOW,
    OVERFLOW,
    SHARED_OVERFLOW,
    SendOutcome,
    SendQueue,
    SlowConsumer,
)
from ...core.addresses import address_key
from ...core.runtime import TIME_SLICE, clock
from ...events.dispatch import DispatchBounds, EventDispatcher
from ...events.pieces import TimeSlice
from ...telemetry.records import SendLoss, Violation
from .outgoing import ClientMessage
from .websocket import leave_uwsgi, take_socket, wants_websocket
from .websocket_transport import LibraryTransport, ProtocolTransport, WebSocketTransport, keep_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from engineio.socket import Socket as _Socket

    from ...clients.fan_out import Batch
    from ...core.runtime import Flag
    from ...events.dispatch import Work
    from ...ports import Connection, Ports, Timer
else:
    from engineio.socket import Socket as _Socket

_UPGRADE_TIMEOUT = (
    10.0  # between the two messages of a client that changes to WebSocket, in seconds
)
_ROOM_INTERVAL = 1.0  # seconds; between two looks at a client that is waited for
_POST_PATIENCE = 4.0  # seconds; Engine.IO's client for Python gives a request up after five
_LOOK_INTERVAL = 1.0  # seconds
_ANSWER_FACTOR: Final = 8
_TURN = 16  # packets of one request before others have their turn
_BYTES_PER_PACKET = 4096  # that count as one more
_JOIN_COST = 4 * _BYTES_PER_PACKET  # a connect handler, and a disconnect handler later
_FORM = "d="  # as JSONP sends one
_MAX_FIELDS = 16
_ESCAPED = 4 * 1024  # characters of a form that are looked at in one go; a megabyte takes 70 ms
_SEPARATOR = "\x1e"
_MESSAGE = str(packets.MESSAGE)
_BASE64 = "b"
_CONTROL = 64  # characters
PROBE = "2probe"
PROBE_ANSWER = "3probe"
UPGRADE = "5"
# One for all clients: a message is made once.
_CLOSE = ClientMessage.of_engineio(Packet(packets.CLOSE))
_NOOP = ClientMessage.of_engineio(Packet(packets.NOOP))
_PING = ClientMessage.of_engineio(Packet(packets.PING))


_MINUTE = 60.0  # seconds


class ProtocolViolation(EngineIOError):
    """A client sent what the protocols do not allow.

    Attributes:
        reason: See :class:`~flask_socketio_guard.telemetry.records.Violation`.
        code: WebSocket close code that tells the client.
        text: WebSocket close reason.
    """

    code = CloseCode.PROTOCOL_ERROR
    text = "protocol error"

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:200]


class TooLarge(ProtocolViolation):
    """A client sent more than it may in one packet."""

    code = CloseCode.MESSAGE_TOO_BIG
    text = "too many lists and objects"


class TooManyJoins(ProtocolViolation):
    """A client sent CONNECT packets without end."""

    code = CloseCode.POLICY_VIOLATION
    text = "too many connects"


class GuardedSocket(_Socket):
    """Stands in for ``engineio.socket.Socket``.

    Its queue is bounded, it needs no task of its own for pings nor to write, and
    once it is closed nothing of it is left: no descriptor, no task, no entry.

    Args:
        server: The guarded Engine.IO server.
        sid: Id of the session.
        environ: WSGI environ of the request that opened it.

    Attributes:
        is_counted: Whether the client counts among those from its address.
        refused_by: The namespace that has refused it last.
    """

    def __init__(self, server: Any, sid: str, environ: WSGIEnvironment) -> None:
        # Not upstream's: that makes an unbounded queue.
        guard: Ports = server.guard
        config = guard.config
        self.server = server
        self.sid = sid
        self.address = address_key(environ.get("REMOTE_ADDR", ""))
        self._environ = environ
        self.session: dict[str, Any] = {}
        self.connected = False
        self.upgrading = False
        self.upgraded = False
        self.closing = False
        self.closed = False
        self.is_counted = True
        self.last_ping: float | None = None
        self.refused_by = ""
        self.opened_at = clock()
        self._joins = 0
        self._joins_since = 0.0
        self._unpaid = 0
        self._is_heard = False
        self.queue = SendQueue(
            max_packets=config.send_queue_max_packets,
            max_bytes=config.send_queue_max_bytes,
            policy=SlowConsumer(config.slow_consumer),
        )
        self._guard = guard
        self._fan_out = guard.fan_out
        self._lock = server.queue_lock
        self._dispatcher: EventDispatcher | None = None
        self._room: Flag | None = None  # while nothing is read
        self._is_read_to_end = False
        self._transport: WebSocketTransport | None = None
        self._candidate: WebSocketTransport | None = None  # while the client changes over to it
        self._poll: Any = None
        self._heartbeat: Timer | None = None
        self._join: Timer | None = guard.deadlines.call_later(config.join_timeout, self._not_joined)

    # Sending

    def put(
        self, message: ClientMessage, *, may_wait: bool = False, is_own: bool = False
    ) -> SendOutcome:
        """Queue *message* for the client.

        Args:
            message: Taken whole or not at all.
            may_wait: Whether to wait for room while the client makes progress, where
                the caller is a task.
            is_own: Whether to wait as a handler of the client itself does.

        Returns:
            What became of it.
        """
        if self._fan_out is not None and self._fan_out.is_busy:
            self._fan_out.settle(self)
        return self._enqueue(message, may_wait=may_wait, is_own=is_own)

    def write(self, batch: Batch) -> None:
        """Write a batch of broadcasts, or queue them behind what waits; never waits."""
        transport = self._transport
        if transport is None or not transport.write_now(batch.frames):
            for message in batch.messages:
                self._enqueue(message)

    def wait_until_not_behind(self) -> None:
        """Hold up who broadcasts faster than the client reads, while it makes progress."""
        if self._guard.runtime.can_wait():
            self._make_room(BROADCAST_OVERFLOW, is_waiting=True, unsent=0)
            self.server.behind.discard(self)

    def _enqueue(
        self, message: ClientMessage, *, may_wait: bool = False, is_own: bool = False
    ) -> SendOutcome:
        if self.closed:
            return SendOutcome.DROPPED_CLOSED
        if message.is_volatile and self._is_behind():
            self._guard.telemetry.send(SendLoss(1, "volatile"))
            return SendOutcome.DROPPED_SLOW
        # Answers too: who asks and never reads must not be owed without bound.
        with self._lock:
            is_taken = self.queue.offer(message)
        if not is_taken:
            dropped = self._make_room_for_one(may_wait=may_wait, is_own=is_own)
            if dropped is not None:
                return dropped
            with self._lock:
                self.queue.put(message)
        if self._transport is not None:
            self._transport.wake()
        elif (poll := self._poll) is not None:  # it may end in another thread
            poll.set()
        return SendOutcome.QUEUED

    def _make_room_for_one(self, *, may_wait: bool, is_own: bool) -> SendOutcome | None:
        """See that the queue, which is full, can take one more; see :meth:`_make_room`.

        A handler of the client itself waits as long as the client makes progress: that holds
        up nobody else. An emitter with others to serve waits later, and not for ever. What
        cannot wait passes, within a wider bound.
        """
        if self._transport is not None:
            self._transport.flush()  # it may only not have had its turn yet
        if not self.queue.is_full:
            return None
        if not may_wait or not self._guard.runtime.can_wait():
            dropped = self._make_room(OVERFLOW, is_waiting=False)
            if self.queue.is_over(BROADCAST_OVERFLOW):
                self.server.behind.add(self)
            return dropped
        is_own = is_own or _current_environ() is self._environ
        return self._make_room(1 if is_own else SHARED_OVERFLOW, is_waiting=True, is_own=is_own)

    def _make_room(
        self, overflow: int, *, is_waiting: bool, is_own: bool = False, unsent: int = 1
    ) -> SendOutcome | None:
        """See that the queue can take more.

        Args:
            overflow: Times the bounds that are allowed.
            is_waiting: Whether to wait where these are reached.
            is_own: Whether the emitter serves nobody but this client.
            unsent: Messages that are lost with those that wait, if they are.

        Returns:
            ``None`` if it can; what becomes of *unsent* if not: the client is gone then.
        """
        queue, timeout = self.queue, self._guard.config.slow_consumer_timeout
        while not self.closed:
            with self._lock:
                if not queue.is_full:
                    return None
                # Whoever waits for packets with a request has only not had its turn yet.
                is_slow = self._poll is None and queue.is_slow(timeout, is_shared=not is_own)
                is_over = queue.is_over(overflow)
            if is_slow or (is_over and not is_waiting):
                return self._give_up(unsent)
            if not is_over:
                return None
            with self._lock:
                # Made for who waits only: whoever writes sets it each time.
                room = queue.room = queue.room or self._guard.flag()
            room.clear()
            if queue.is_over(overflow):
                room.wait(min(_ROOM_INTERVAL, timeout / 4))
        return SendOutcome.DROPPED_CLOSED

    def _give_up(self, unsent: int) -> SendOutcome | None:
        """Do with a slow client what the policy says; see :meth:`_make_room`."""
        with self._lock:
            dropped = self.queue.make_room() if self.queue.is_full else 0
        if dropped is not None:
            if dropped:
                self._guard.telemetry.send(SendLoss(dropped, "slow"))
            return None
        with self._lock:
            lost = self.queue.clear()
        self._guard.telemetry.send(SendLoss(lost + unsent, "slow"))
        self.close(
            reason=self.server.reason.TRANSPORT_ERROR,
            code=CloseCode.POLICY_VIOLATION,
            text="slow consumer",
        )
        return SendOutcome.DROPPED_SLOW

    def _is_behind(self) -> bool:
        return self._transport.is_stuck if self._transport is not None else self.queue.is_filling

    def send(self, pkt: Any) -> None:
        """Queue one Engine.IO packet; as upstream's ``send``."""
        self.put(ClientMessage.of_engineio(pkt))

    def poll(self) -> list[Any]:
        """Wait for packets for the answer to a polling request."""
        if self._room is not None:
            self._is_heard = True  # its pong has to wait behind the request that is not read
        if not self.queue and not self.closed:
            if self._poll is not None:
                # Source: Engine.IO protocol v4, "a client sends no second GET while one waits".
                raise ProtocolViolation("payload", "two polling requests at a time")
            poll = self._poll = self._guard.flag()
            try:
                if not self.queue and not self.closed:
                    poll.wait(self.server.ping_interval + self.server.ping_timeout)
            finally:
                self._poll = None
        with self._lock:
            messages = cast(
                "list[ClientMessage]", self.queue.take(self.server.max_http_buffer_size)
            )
            self.queue.downloads(sum(message.size for message in messages))
        if not messages and self.closed:
            raise EngineIOError("the session is over")
        return [packet for message in messages for packet in message.packets()]

    def forsake(self) -> None:
        """Have no part of it, in a forked child: its client is the parent's."""
        self.closing = self.closed = True

    # Heartbeat

    def schedule_ping(self) -> None:
        """Send a ping after the interval; for the client's pong too."""
        if not self.closed:
            self._heartbeat = self._guard.deadlines.call_later(
                self.server.ping_interval, self._send_ping
            )

    def _send_ping(self) -> None:
        if self.closed:
            return
        self.last_ping = time.time()  # upstream's check_ping_timeout() reads it
        self._is_heard = False
        self._heartbeat = self._guard.deadlines.call_later(
            self.server.ping_timeout, self._ping_overdue
        )
        self.put(_PING)

    def _ping_overdue(self) -> None:
        # Its answer is behind much else that it sends. Over polling it asks for more meanwhile.
        is_behind = self._room is not None and (
            self._transport is not None or self._poll is not None
        )
        if (self._is_heard or is_behind) and not self.closed:
            self._send_ping()  # it waits for the next ping itself
            return
        self.close(abort=True, reason=self.server.reason.PING_TIMEOUT)

    def check_ping_timeout(self) -> bool:
        """Say whether the client is there; the heartbeat finds out by itself."""
        return not self.closed

    def _pong(self) -> None:
        if self.last_ping and self._heartbeat is not None:
            self.last_ping = None
            self._heartbeat.cancel()
            self.schedule_ping()

    def joined(self) -> None:
        """Note that the client has joined a namespace."""
        if self._join is not None:
            self._join.cancel()
            self._join = None
            self.server.unjoined.pop(self.sid, None)

    def may_join(self) -> bool:
        """Count a CONNECT packet; say whether the client may send as many."""
        now = clock()
        if now - self._joins_since >= _MINUTE:
            self._joins, self._joins_since = 0, now
        self._joins += 1
        self._unpaid += _JOIN_COST
        return self._joins <= self._guard.config.max_joins_per_minute

    def _not_joined(self) -> None:
        self.close(reason=self.server.reason.SERVER_DISCONNECT)

    # Receiving

    def receive(self, pkt: Any) -> None:
        """Act on one packet of the client.

        Raises:
            ProtocolViolation: It has no place here.
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
            self.put(_NOOP)
        elif kind != packets.NOOP:
            raise ProtocolViolation("packet", f"an Engine.IO packet of type {kind}")

    def _take_message(self, data: Any) -> None:
        self._is_heard = True
        self.server.handlers["message"](self.sid, data)

    def submit(
        self, work: Work, message: str | bytes, *, more_bytes: int = 0, is_early: bool = False
    ) -> None:
        """Run an event of the client; see :meth:`EventDispatcher.submit`."""
        dispatcher = self._dispatcher or self._new_dispatcher()
        dispatcher.submit(work, message, more_bytes=more_bytes, is_early=is_early)

    @property
    def has_waiting(self) -> bool:
        """Whether events of the client wait, or run."""
        dispatcher = self._dispatcher
        return dispatcher is not None and bool(dispatcher.waiting or dispatcher.running)

    def release(self, connection: Connection) -> None:
        """Run what came before *connection* was let in."""
        if self._dispatcher is not None:
            self._dispatcher.release(connection)

    def drop(self, connection: Connection) -> None:
        """Lose what of *connection* waits."""
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

    # Reading no further

    def _wait_for_room(
        self, give_up_at: float | None = None, transport: WebSocketTransport | None = None
    ) -> None:
        """Read nothing more until the client's events have become less.

        An answer that a running handler waits for may be behind them: while the client owes one
        it is read on, up to a larger bound.

        Args:
            give_up_at: For a request: until when it waits below the larger bound.
            transport: For a WebSocket: what is read.
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
                    self._is_read_to_end = True  # what the kernel has, which is not much
                    break
                room.wait(_LOOK_INTERVAL)
                room.clear()
        finally:
            dispatcher.on_room = None
            self._room = None
            self._is_heard = True  # as soon as there is something to read

    def _is_over(self, dispatcher: EventDispatcher) -> bool:
        bound = self._guard.config.max_waiting_bytes
        if dispatcher.size < bound:
            return False
        return dispatcher.size >= _ANSWER_FACTOR * bound or not self._owes_answer()

    def _owes_answer(self) -> bool:
        guard = self._guard
        connections = guard.connections.of(self.sid)
        return any(guard.callbacks.is_owed_by(connection.sid) for connection in connections)

    def look_for_answer(self) -> None:
        """Read on: the client has been asked something."""
        if self._room is not None:
            self._room.set()

    # Requests

    def handle_post_request(self, environ: WSGIEnvironment) -> None:
        """Act on the packets of a polling request.

        Raises:
            EngineIOError: They are too large or wrong; the answer is 400 then,
                and the session over.
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
                weight += 1 + len(message) // _BYTES_PER_PACKET
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
            raise ProtocolViolation("payload", "Content-Length is no number") from exc
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
            # What upstream's packet would find out as well, by an exception.
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

    # WebSocket

    def handle_get_request(self, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        """Answer a polling request, or serve a WebSocket until it ends."""
        if wants_websocket(environ):
            return self._upgrade_websocket(environ, start_response)
        if self.upgrading or self.upgraded:
            return [Packet(packets.NOOP)]
        try:
            return self.poll()
        except ProtocolViolation as exc:
            self.violated(exc)
            raise

    def _upgrade_websocket(self, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        if self.upgraded or self.upgrading or self.closed:
            return self.server._bad_request()
        if self.server.is_out_of_threads(environ):
            return self.server._refused(environ, "full")  # it goes on polling
        if self._guard.runtime.can_kill:
            return self._serve_raw(environ)
        adapter = self.server._async["websocket"](
            self._serve_library, self.server, max_message_size=self.server.max_http_buffer_size
        )
        return adapter(environ, start_response)

    def _serve_raw(self, environ: WSGIEnvironment) -> list[bytes]:
        raw = take_socket(environ, is_compressing=self._guard.config.websocket_compression)
        if raw is None:
            raise RuntimeError(
                "this server does not hand over its sockets: use gunicorn with a gevent "
                "worker, uWSGI, or gevent's server with gevent-websocket's handler"
            )
        silence = self.server.ping_interval + self.server.ping_timeout
        keep_alive(raw.sock, silence=silence)
        try:
            self._serve(
                ProtocolTransport(
                    raw, self.queue, self._guard, max_size=self.server.max_http_buffer_size
                )
            )
        finally:
            if raw.websocket is not None:
                raw.websocket.closed = True  # all has been said
            leave_uwsgi(environ)
        if "gunicorn.socket" in environ:
            raise StopIteration  # tells gunicorn to close the connection without an answer
        return []

    def _serve_library(self, websocket: Any) -> list[bytes]:
        keep_alive(websocket.ws.sock, silence=self.server.ping_interval + self.server.ping_timeout)
        self._serve(
            LibraryTransport(
                websocket,
                self.queue,
                self._guard,
                lock=self._lock,
                max_size=self.server.max_http_buffer_size,
            )
        )
        return []

    def _serve(self, transport: WebSocketTransport) -> None:
        messages = _messages_of(transport)
        self.server.websocket_transports.add(transport)
        try:
            is_direct = not self.connected
            if not is_direct and not self._has_upgraded(transport, messages):
                return
            if self.closed:
                return
            self._transport = transport
            self.connected = self.upgraded = True
            self._upgraded(is_direct=is_direct)
            transport.start()
            self._read(transport, messages)
        finally:
            if self._transport is transport:
                self.close(
                    abort=not transport.is_leaving, reason=self.server.reason.TRANSPORT_CLOSE
                )
            if transport.is_leaving:
                transport.leave()
            transport.abort()
            self.server.websocket_transports.discard(transport)

    def _has_upgraded(self, transport: WebSocketTransport, messages: Iterator[str | bytes]) -> bool:
        """Move the session from polling to *transport*.

        Source:
            Engine.IO protocol v4, "Upgrade": probe, its answer, upgrade; what
            is sent in between waits.
        """
        self.upgrading = True
        self._candidate = transport
        deadline = self._guard.deadlines.call_later(_UPGRADE_TIMEOUT, transport.abort)
        try:
            first = next(messages, None)
            if first != PROBE:
                self._has_failed_to_upgrade(first, is_first=True)
                return False
            transport.send_at_once(PROBE_ANSWER)
            if self._poll is not None:
                self.put(_NOOP)  # ends it
            second = next(messages, None)
        except OSError:
            return False
        else:
            if second != UPGRADE:
                self._has_failed_to_upgrade(second, is_first=False)
            return second == UPGRADE
        finally:
            deadline.cancel()
            self.upgrading = False
            self._candidate = None

    def _upgraded(self, *, is_direct: bool) -> None:
        """Take note that the session is on a WebSocket, from its beginning or by an upgrade."""

    def _has_failed_to_upgrade(self, received: str | bytes | None, *, is_first: bool) -> None:
        """Take note that the first or second message of an upgrade was none."""

    def _read(self, transport: WebSocketTransport, messages: Iterator[str | bytes]) -> None:
        for message in messages:
            if self.closed:
                continue  # until the client has seen that
            try:
                self._act_on(message, "packet")
                if self._dispatcher is not None and self._dispatcher.is_full:
                    self._wait_for_room(transport=transport)
                size, self._unpaid = len(message) + self._unpaid, 0
                transport.pay(size)
            except ProtocolViolation as exc:
                self.violated(exc)

    # The end

    def close(
        self,
        wait: bool = True,
        abort: bool = False,
        reason: str | None = None,
        *,
        code: int = CloseCode.NORMAL_CLOSURE,
        text: str = "",
    ) -> None:
        """End the session; idempotent, never waits.

        The disconnect handlers run in a task of their own.

        Args:
            wait: Taken for upstream's sake.
            abort: Whether to say nothing to the client: it is gone.
            reason: For the disconnect handlers.
            code: WebSocket close code.
            text: WebSocket close reason.
        """
        del wait
        if self._fan_out is not None and self._fan_out.is_busy and not abort:
            self._fan_out.settle(self)
        with self._lock:
            if self.closed:
                return
            self.closing = self.closed = True
        for timer in (self._heartbeat, self._join):
            if timer is not None:
                timer.cancel()
        self._heartbeat = self._join = None
        if self._candidate is not None:
            self._candidate.abort()
        if self._transport is None:
            self._close_polling(abort=abort, code=code)
        elif abort:
            self._transport.abort()
        else:
            if code == CloseCode.NORMAL_CLOSURE:
                self._put_last(_CLOSE)
            self._transport.close(code, text)
        self.queue.wake()
        self.server.behind.discard(self)
        if self._room is not None:
            self._room.set()
        self.server.departing[self.sid] = self
        self.server.forget(self)
        why = reason or self.server.reason.SERVER_DISCONNECT
        self._guard.spawn("disconnect", lambda: self.server.depart(self, why))

    def _close_polling(self, *, abort: bool, code: int) -> None:
        if code == CloseCode.NORMAL_CLOSURE:
            self._put_last(_NOOP if abort else _CLOSE)
        else:
            with self._lock:
                self.queue.clear()  # the answer is an error then, see poll()
        if self._poll is not None:
            with suppress(Exception):
                self._poll.set()

    def _put_last(self, message: ClientMessage) -> None:
        # After a CLOSE a client stays away. One that is to come back, to this process
        # or the next, must not be sent it.
        with self._lock:
            self.queue.put(message)


def _messages_of(transport: WebSocketTransport) -> Iterator[str | bytes]:
    """Yield what comes over *transport*, one by one: several may come in one piece."""
    while (messages := transport.receive()) is not None:
        yield from messages


def _packets_in(payload: str) -> Iterator[str]:
    """Yield the packets of a payload one by one: there may be half a million of them.

    Upstream takes sixteen, and drops all where there are more; a browser that was away sends
    all that it has kept in one request.
    """
    start, end = 0, 0
    while payload and end >= 0:
        end = payload.find(_SEPARATOR, start)
        yield payload[start:] if end < 0 else payload[start:end]
        start = end + 1


def _form_value(body: str, take_turn: Callable[[], object]) -> str:
    """Return the first field of a form, such as JSONP sends.

    Args:
        body: Of a request.
        take_turn: Called now and then.

    Raises:
        ProtocolViolation: It is empty, or there are too many others.

    Source:
        WHATWG URL standard, "application/x-www-form-urlencoded parsing".
    """
    text = body[len(_FORM) :].partition("&")[0]
    if not text or body.count("&") >= _MAX_FIELDS:
        raise ProtocolViolation("payload", "a form of no field, or of too many")
    parts = []
    at = 0
    while at < len(text):
        take_turn()
        end = at + _ESCAPED
        escape = text.find("%", end - 2, end)  # it is three characters long
        end = end if escape < 0 else escape
        parts.append(unquote_to_bytes(text[at:end].replace("+", " ")))
        at = end
    return b"".join(parts).decode(errors="replace")


def _decoded(message: str | bytes, source: str) -> Any:
    """Return an Engine.IO packet that carries no text of Socket.IO."""
    if isinstance(message, str):
        if message.startswith(_MESSAGE):
            raise ProtocolViolation("packet", "not a Socket.IO packet: it has no type")
        if not message.startswith(_BASE64):
            # Upstream decodes JSON there; nothing of what a ping or pong carries is of any use.
            message = message[:_CONTROL]
    try:
        return Packet(encoded_packet=message)
    except Exception as exc:
        raise ProtocolViolation(source, f"not an Engine.IO packet: {exc}") from exc


def _current_environ() -> WSGIEnvironment | None:
    """Return the WSGI environ of the connection, or request, that the caller acts for."""
    return flask.request.environ if flask.has_request_context() else None
