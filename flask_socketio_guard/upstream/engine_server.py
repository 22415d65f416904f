"""The guarded side of ``engineio.Server``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engineio import packet as packets
from engineio.packet import Packet

from ..sending import SendOutcome
from ..signals import logger
from .engine_socket import GuardedSocket
from .outgoing import Message
from .websocket import upgrade_problem, wants_websocket

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from engineio import Server as _Server

    from ..hooks import Hooks
    from .wire import Wire
else:
    _Server = object

_REASONS = {
    "bad-origin": "origin",
    "bad-version": "version",
    "bad-sid": "session",
    "not-connected": "session",
    "unexpected-http": "session",
    "bad-upgrade": "upgrade",
    "bad-transport": "request",
    "bad-jsonp-index": "request",
}
"""Upstream's keys of what it refuses, in the words of ``HandshakeRefusal``."""

_FOR_DEVELOPERS = frozenset({"bad-origin", "bad-version"})


class GuardedEngineServer(_Server):
    """Goes in front of ``engineio.Server``: every request of a client passes through here."""

    guard: Hooks
    queue_lock: threading.Lock
    departing: dict[str, GuardedSocket]
    """Sessions that have ended and whose disconnect handlers run."""
    behind: set[GuardedSocket]
    """Sessions whose clients read more slowly than others broadcast."""
    wires: set[Wire]
    """WebSockets that are served, until the last word is said."""

    def handle_request(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request; as upstream's."""
        # The mended handler of gevent-websocket has looked before it answered.
        if wants_websocket(environ) and "wsgi.websocket" not in environ:
            problem = upgrade_problem(environ)
            if problem is not None:
                self.guard.facts.handshake_refused("upgrade", problem)
                answer = self._bad_request()
                start_response(answer["status"], answer["headers"])
                return [answer["response"]]
        return super().handle_request(environ, start_response)

    def _handle_connect(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        transport: str,
        jsonp_index: int | None = None,
    ) -> Any:
        sid = self.generate_id()
        socket = GuardedSocket(self, sid, environ)
        self.sockets[sid] = socket
        self.guard.came(socket.address)
        socket.send(
            Packet(
                packets.OPEN,
                {
                    "sid": sid,
                    "upgrades": self._upgrades(sid, transport),
                    "pingTimeout": int(self.ping_timeout * 1000),
                    "pingInterval": int(
                        (self.ping_interval + self.ping_interval_grace_period) * 1000
                    ),
                    "maxPayload": self.max_http_buffer_size,
                },
            )
        )
        self.handlers["connect"](sid, environ)
        socket.schedule_ping()
        if transport == "websocket":
            try:
                return socket.handle_get_request(environ, start_response)
            finally:
                socket.close(abort=True, reason=self.reason.TRANSPORT_CLOSE)
        socket.connected = True
        return self._ok(socket.poll(), headers=self._cookies(sid), jsonp_index=jsonp_index)

    def _cookies(self, sid: str) -> list[tuple[str, str]] | None:
        if not self.cookie:
            return None
        attributes = self.cookie
        if not isinstance(attributes, dict):
            attributes = {"name": self.cookie, "path": "/", "SameSite": "Lax"}
        return [("Set-Cookie", self._generate_sid_cookie(sid, attributes))]

    def send_packet(self, sid: str, pkt: Any) -> SendOutcome:
        """Queue one Engine.IO packet for a client; as upstream's."""
        return self.put(sid, Message.of_engineio(pkt))

    def put(self, eio_sid: str | None, message: Message, *, may_wait: bool = False) -> SendOutcome:
        """Queue *message* for a client; see :meth:`GuardedSocket.put`."""
        socket = self.sockets.get(eio_sid)
        if socket is None:
            logger.debug("a message was not sent: its client is gone")
            return SendOutcome.DROPPED_CLOSED
        outcome: SendOutcome = socket.put(message, may_wait=may_wait)
        return outcome

    def forget(self, socket: GuardedSocket) -> None:
        """Drop the entry of a socket that is closed; upstream may have done so before."""
        self.sockets.pop(socket.sid, None)
        with self.queue_lock:
            is_counted, socket.is_counted = socket.is_counted, False
        if is_counted:
            self.guard.left(socket.address)

    def depart(self, socket: GuardedSocket, reason: str) -> None:
        """Have the disconnect handlers run, which may still read its session."""
        try:
            self.handlers["disconnect"](socket.sid, reason)
        finally:
            self.departing.pop(socket.sid, None)

    def _get_socket(self, sid: str) -> GuardedSocket:
        socket = self.sockets.get(sid) or self.departing.get(sid)
        if socket is None:
            raise KeyError("Session not found")
        return socket

    def disconnect(self, sid: str | None = None) -> None:
        """Close one session, or all; as upstream's."""
        for socket in [self.sockets.get(sid)] if sid is not None else list(self.sockets.values()):
            if socket is not None:
                socket.close(reason=self.reason.SERVER_DISCONNECT)

    def _log_error_once(self, message: str, message_key: str) -> None:
        reason = _REASONS.get(message_key)
        if reason is None:
            super()._log_error_once(message, message_key)
            return
        # An origin or a version that is refused is most often a mistake of the
        # developer's, who has to see which.
        detail = message if message_key in _FOR_DEVELOPERS else message_key
        self.guard.facts.handshake_refused(reason, detail[:200])
