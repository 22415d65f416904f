"""The guarded Engine.IO socket: one client's session, over polling or WebSocket."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from engineio import packet as packets
from engineio.packet import Packet
from websockets.frames import CloseCode

from ...clients.send_queue import (
    SendQueue,
    SlowConsumer,
)
from ...core.addresses import address_key
from ...core.runtime import clock
from .keepalive import keep_alive
from .library_transport import LibraryTransport
from .outgoing import ClientMessage
from .receiving import BYTES_PER_PACKET, NOOP, Receiving
from .sending import Sending
from .violations import ProtocolViolation
from .websocket import leave_uwsgi, take_socket, wants_websocket
from .websocket_transport import ProtocolTransport, WebSocketTransport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from ...core.deadlines import Deadline
    from ...ports import Ports
else:
    pass

_UPGRADE_TIMEOUT = 10.0  # seconds for the whole upgrade from polling to WebSocket
_JOIN_COST = 4 * BYTES_PER_PACKET  # for a connect handler, and a disconnect handler later
PROBE = "2probe"
PROBE_ANSWER = "3probe"
UPGRADE = "5"
# Shared by all clients, so that each is encoded only once.
_CLOSE = ClientMessage.of_engineio(Packet(packets.CLOSE))
_PING = ClientMessage.of_engineio(Packet(packets.PING))


_MINUTE = 60.0  # seconds


class GuardedSocket(Sending, Receiving):
    """Replaces ``engineio.socket.Socket``.

    Its send queue is bounded, and it needs no task of its own to send pings or to write. A
    closed socket leaks nothing: no descriptor, no task and no entry in the server.

    Args:
        server: The guarded Engine.IO server.
        sid: Id of the session.
        environ: WSGI environ of the request that opened the session.

    Attributes:
        is_counted: Whether the client still counts towards the limit of its address.
        refused_by: The namespace that refused the client most recently, or ``""``.
    """

    def __init__(self, server: Any, sid: str, environ: WSGIEnvironment) -> None:
        # Upstream's __init__ is not called: it would create an unbounded queue.
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
        self._dispatcher = None
        self._room = None
        self._is_read_to_end = False
        self._transport: WebSocketTransport | None = None
        self._candidate: WebSocketTransport | None = None  # set during an upgrade
        self._poll = None
        self._heartbeat: Deadline | None = None
        self._join: Deadline | None = guard.deadlines.call_later(
            config.join_timeout, self._not_joined
        )

    def forsake(self) -> None:
        """Disown the session in a forked child: the client belongs to the parent."""
        self.closing = self.closed = True

    # Heartbeat

    def schedule_ping(self) -> None:
        """Send a ping after ``ping_interval``; called at the start and after each pong."""
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
        # While reading is suspended, the pong is held up behind other packets. A client that
        # polls shows that it is still there by its pending poll.
        is_behind = self._room is not None and (
            self._transport is not None or self._poll is not None
        )
        if (self._is_heard or is_behind) and not self.closed:
            self._send_ping()  # the client expects pings at an interval, too
            return
        self.close(abort=True, reason=self.server.reason.PING_TIMEOUT)

    def check_ping_timeout(self) -> bool:
        """Return whether the session is open; the heartbeat has its own deadline."""
        return not self.closed

    def _pong(self) -> None:
        if self.last_ping and self._heartbeat is not None:
            self.last_ping = None
            self._heartbeat.cancel()
            self.schedule_ping()

    def joined(self) -> None:
        """Cancel the join timeout: the client has joined a namespace."""
        if self._join is not None:
            self._join.cancel()
            self._join = None
            self.server.unjoined.pop(self.sid, None)

    def may_join(self) -> bool:
        """Count a CONNECT packet and return whether it is within the rate limit."""
        now = clock()
        if now - self._joins_since >= _MINUTE:
            self._joins, self._joins_since = 0, now
        self._joins += 1
        self._unpaid += _JOIN_COST
        return self._joins <= self._guard.config.max_joins_per_minute

    def _not_joined(self) -> None:
        self.close(reason=self.server.reason.SERVER_DISCONNECT)

    # WebSocket

    def handle_get_request(self, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        """Respond to a polling request, or serve a WebSocket until it closes."""
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
            return self.server._refused(environ, "full")  # the client continues to poll
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
                raw.websocket.closed = True  # the close frame has been sent
            leave_uwsgi(environ)
        if "gunicorn.socket" in environ:
            raise StopIteration  # tells gunicorn to close the connection without a response
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
            Engine.IO protocol v4, "Upgrade": a probe, its answer, then an upgrade packet.
            Messages sent in between stay queued.
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
                self.put(NOOP)  # ends the pending poll
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
        """Do nothing; a hook for `WatchedSocket`, called once the session uses a WebSocket."""

    def _has_failed_to_upgrade(self, received: str | bytes | None, *, is_first: bool) -> None:
        """Do nothing; a hook for `WatchedSocket`, called after a wrong message in an upgrade."""

    def _read(self, transport: WebSocketTransport, messages: Iterator[str | bytes]) -> None:
        for message in messages:
            if self.closed:
                continue  # discard until the client has received the close frame
            try:
                self._act_on(message, "packet")
                if self._dispatcher is not None and self._dispatcher.is_full:
                    self._wait_for_room(transport=transport)
                size, self._unpaid = len(message) + self._unpaid, 0
                transport.pay(size)
            except ProtocolViolation as exc:
                self.violated(exc)

    # Closing

    def close(
        self,
        wait: bool = True,
        abort: bool = False,
        reason: str | None = None,
        *,
        code: int = CloseCode.NORMAL_CLOSURE,
        text: str = "",
    ) -> None:
        """Close the session; idempotent, never blocks.

        The disconnect handlers run in a task of their own.

        Args:
            wait: Ignored; part of upstream's signature.
            abort: Whether to end the connection without a CLOSE packet or close frame, because
                the client has gone.
            reason: Passed to the disconnect handlers; by default, a disconnect by the server.
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
            self._put_last(NOOP if abort else _CLOSE)
        else:
            with self._lock:
                self.queue.clear()  # poll() then raises, and the response is an error
        if self._poll is not None:
            with suppress(Exception):
                self._poll.set()

    def _put_last(self, message: ClientMessage) -> None:
        # A client does not reconnect after a CLOSE packet. One that should, to this process or
        # another, must not receive it. The bounds of the queue do not apply.
        with self._lock:
            self.queue.put(message)


def _messages_of(transport: WebSocketTransport) -> Iterator[str | bytes]:
    """Yield the messages of *transport* one by one; one read may return several."""
    while (messages := transport.receive()) is not None:
        yield from messages
