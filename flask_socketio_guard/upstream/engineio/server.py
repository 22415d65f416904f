"""The guarded side of ``engineio.Server``."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from engineio import packet as packets
from engineio.packet import Packet
from websockets.frames import CloseCode

from ...clients.send_queue import SendOutcome
from ...core.addresses import address_key
from ...core.runtime import clock
from ...telemetry.records import HandshakeRefusal, logger
from .outgoing import ClientMessage
from .session_ids import new_session_id
from .socket import GuardedSocket
from .watched_socket import WatchedSocket, admin_of, is_logged
from .websocket import answer_once, is_refusable, refuse_websocket, upgrade_problem, wants_websocket

if TYPE_CHECKING:
    import threading
    from collections import deque
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from engineio import Server as _Server

    from ...events.pieces import Line
    from ...ports import Ports
    from .websocket_transport import WebSocketTransport
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
"""Upstream's key for each refusal, mapped to the ``reason`` of a ``HandshakeRefusal``."""

_REFUSALS = {
    "full": "the server is full",
    "address": "too many connections from this address",
    "rate": "too many new connections",
    "draining": "the server is shutting down",
}
"""Why a client is refused, as the close reason of a WebSocket that is already open."""

_ELSEWHERE = (
    "its session does not belong to this process: use sticky sessions in the load balancer, run "
    "one worker per gunicorn, or allow WebSockets only; after a restart, clients reconnect by "
    "themselves"
)
_BAD_VERSION = "The client is using an unsupported version of the Socket.IO or Engine.IO protocols"
_JOIN_GRACE = 3.0  # seconds: a client joins one round trip after its handshake
_RETRY_AFTER = "5"  # seconds that a refused client should wait
_SESSION = re.compile("(?:^|&)sid=[^&]")
_ORIGIN = re.compile("https?://[^/?#]+")
_OTHER_SITES = frozenset({"cross-site", "same-site"})
_FOR_DEVELOPERS = frozenset({"bad-origin", "bad-version"})


putting: ContextVar[Mapping[str, bool]] = ContextVar(
    "socketio_guard_putting", default=MappingProxyType({})
)
"""Options of `GuardedSocket.put`, carried past methods that an application may override."""


@contextmanager
def put_as(**how: bool) -> Iterator[None]:
    """Apply options of :meth:`GuardedSocket.put` to packets sent in this context."""
    token = putting.set(how)
    try:
        yield
    finally:
        putting.reset(token)


class GuardedEngineServer(_Server):
    """Mixed in before ``engineio.Server``; every request of a client passes through it."""

    guard: Ports
    queue_lock: threading.Lock
    line: Line
    """The line in which tasks that decode large packets wait."""
    departing: dict[str, GuardedSocket]
    """Closed sessions whose disconnect handlers are still running, by session id."""
    behind: set[GuardedSocket]
    """Sessions whose clients read more slowly than broadcasts arrive."""
    unjoined: dict[str, GuardedSocket]
    """Sessions that have not joined a namespace yet, oldest first, by session id."""
    ended: deque[str]
    """Ids of the most recently closed sessions, which clients may still request."""
    websocket_transports: set[WebSocketTransport]
    """WebSockets being served, up to the end of their closing handshake."""
    socket_class: type[GuardedSocket] = GuardedSocket
    spawn_event: Callable[..., object] | None = None
    """The application's own override for starting the task of an event, if there is one."""

    def handle_request(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request, like upstream's method."""
        # The patched handler of gevent-websocket has checked the request before its 101.
        if wants_websocket(environ) and "wsgi.websocket" not in environ:
            start_response = answer_once(environ, start_response)
            problem = upgrade_problem(environ)
            if problem is not None:
                self.guard.telemetry.send(HandshakeRefusal("upgrade", problem))
                answer = self._bad_request()
                start_response(answer["status"], answer["headers"])
                return [answer["response"]]
        if not _SESSION.search(environ.get("QUERY_STRING", "")):
            flaw = self._handshake_flaw(environ)
            if flaw is not None:
                self._log_error_once(*flaw)
                answer = self._bad_request(flaw[0])
                start_response(answer["status"], answer["headers"] + self._cors_headers(environ))
                return [answer["response"]]
        return super().handle_request(environ, start_response)

    def _handshake_flaw(self, environ: WSGIEnvironment) -> tuple[str, str] | None:
        """Return upstream's message and key for what is wrong with a handshake's query, or None.

        Upstream makes most of these checks as well, but without CORS headers on the response,
        so browsers do not show it to a page from another origin.

        Source:
            Engine.IO protocol v4, "HTTP long-polling", "Query parameters": ``EIO`` and
            ``transport`` are mandatory, and a request without them is answered with 400.
        """
        query = parse_qs(environ.get("QUERY_STRING", ""))
        if query.get("transport", [""])[0] not in self.transports:
            flaw = ("Invalid transport", "bad-transport")
        elif query.get("EIO") != ["4"]:
            flaw = (_BAD_VERSION, "bad-version")
        elif "j" in query and self._is_script_elsewhere(environ):
            flaw = ("Not an accepted origin.", "bad-origin")
        else:
            return None
        is_preflight = environ["REQUEST_METHOD"] == "OPTIONS"
        return None if is_preflight or self._is_from_elsewhere(environ) else flaw

    def _is_from_elsewhere(self, environ: WSGIEnvironment) -> bool:
        """Return whether a request comes from an origin that upstream refuses."""
        origin = environ.get("HTTP_ORIGIN")
        if not origin or self.cors_allowed_origins == []:
            return False
        allowed = self._cors_allowed_origins(environ)
        return allowed is not None and origin not in allowed

    def _is_script_elsewhere(self, environ: WSGIEnvironment) -> bool:
        """Return whether a page from another origin polls by JSONP, which sends no ``Origin``.

        The session would be opened with the cookies of the page's visitor, and the page would
        learn its id, with which the session can be used from anywhere.

        Source:
            W3C, "Fetch Metadata Request Headers", ``Sec-Fetch-Site``; browsers that do not send
            it are served as upstream serves them.
        """
        if environ.get("HTTP_ORIGIN") or environ.get("HTTP_SEC_FETCH_SITE") not in _OTHER_SITES:
            return False
        page = _ORIGIN.match(environ.get("HTTP_REFERER", ""))
        return self._is_from_elsewhere({**environ, "HTTP_ORIGIN": page[0] if page else "null"})

    def _refusal(self, environ: WSGIEnvironment) -> Any:
        """Return the response that refuses a new client, or ``None`` to admit it.

        Called after all other checks of the handshake, so that an invalid handshake does not
        use up the rate limit. Upstream adds the CORS headers to the response.
        """
        address = address_key(environ.get("REMOTE_ADDR", ""))
        if self.is_out_of_threads(environ):
            return self._refused(environ, "full")
        reason = self.guard.admission.refusal(address)
        if reason == "full" and self._close_oldest_unjoined():
            reason = self.guard.admission.refusal(address)
        return None if reason is None else self._refused(environ, reason)

    def is_out_of_threads(self, environ: WSGIEnvironment) -> bool:
        """Return whether a request asks for a WebSocket for which no thread can be spared."""
        most = self.guard.admission.max_websockets
        return (
            most is not None and len(self.websocket_transports) >= most and wants_websocket(environ)
        )

    def _refused(self, environ: WSGIEnvironment, reason: str) -> Any:
        """Count a refusal and return its response: 503, or an empty one after a 101."""
        self.guard.telemetry.send(HandshakeRefusal(reason))
        websocket = environ.get("wsgi.websocket")
        if not is_refusable(environ):
            # gevent-websocket answers 101 before it calls the application.
            refuse_websocket(websocket, _REFUSALS[reason])
            return []
        headers = [
            ("Retry-After", _RETRY_AFTER),
            ("Content-Type", "text/plain"),
            ("Content-Length", "0"),
        ]
        return {"status": "503 Service Unavailable", "headers": headers, "response": b""}

    def generate_id(self) -> str:
        """Return a session id that other processes recognize as one."""
        return new_session_id()

    def _close_oldest_unjoined(self) -> bool:
        """Close the oldest session that had time to join a namespace and did not.

        When the server is full, an idle client must not hold a place for the whole of
        ``join_timeout``.

        Returns:
            Whether a session was closed, so that there is room for a new client.
        """
        now = clock()
        for socket in list(self.unjoined.values()):
            if now - socket.opened_at < _JOIN_GRACE:
                break
            if not self.guard.connections.of(socket.sid):  # no connect handler runs for it
                socket.close(
                    reason=self.reason.SERVER_DISCONNECT,
                    code=CloseCode.TRY_AGAIN_LATER,
                    text=_REFUSALS["full"],
                )
                self.guard.telemetry.send(HandshakeRefusal("unjoined"))
                return True
        return False

    def _handle_connect(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        transport: str,
        jsonp_index: int | None = None,
    ) -> Any:
        refusal = self._refusal(environ)
        if refusal is not None:
            return refusal
        sid = self.generate_id()
        self.check_observers()
        socket = self.socket_class(self, sid, environ)
        self.sockets[sid] = socket
        self.unjoined[sid] = socket
        self.guard.admission.opened(socket.address)
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

    def _ok(
        self,
        packets: list[Any] | None = None,
        headers: list[tuple[str, str]] | None = None,
        jsonp_index: int | None = None,
    ) -> Any:
        """Return the response to a polling request, with JSONP encoded as a JSON string.

        Upstream escapes quotes but not the backslashes before them. A page that polls by JSONP
        would then execute text that other users have written.
        """
        answer = super()._ok(packets, headers)
        if packets is not None and jsonp_index is not None:
            text = json.dumps(answer["response"].decode())
            answer["response"] = f"___eio[{jsonp_index}]({text});".encode()
        return answer

    def check_observers(self) -> None:
        """Switch all sockets to the class that reports each packet while something observes them.

        A log at level INFO observes packets, and so does python-socketio's admin UI.
        """
        is_watched = is_logged(self.logger) or admin_of(self) is not None
        wanted = WatchedSocket if is_watched else GuardedSocket
        if wanted is not self.socket_class:
            self.socket_class = wanted
            for socket in [*self.sockets.values(), *self.departing.values()]:
                socket.__class__ = wanted

    def _cookies(self, sid: str) -> list[tuple[str, str]] | None:
        if not self.cookie:
            return None
        attributes = self.cookie
        if not isinstance(attributes, dict):
            attributes = {"name": self.cookie, "path": "/", "SameSite": "Lax"}
        return [("Set-Cookie", self._generate_sid_cookie(sid, attributes))]

    def send_packet(self, sid: str, pkt: Any) -> SendOutcome:
        """Queue one Engine.IO packet for a client, like upstream's method."""
        return self.put(sid, ClientMessage.of_engineio(pkt), **putting.get())

    def put(self, eio_sid: str | None, message: ClientMessage, **how: bool) -> SendOutcome:
        """Queue *message* for a client; see :meth:`GuardedSocket.put`."""
        socket = self.sockets.get(eio_sid)
        if socket is None:
            logger.debug("a message was not sent: its client has disconnected")
            if self.socket_class is WatchedSocket:
                self.logger.warning("Cannot send to sid %s", eio_sid)
            return SendOutcome.DROPPED_CLOSED
        outcome: SendOutcome = socket.put(message, **how)
        return outcome

    def forget(self, socket: GuardedSocket) -> None:
        """Remove the entries of a closed socket; upstream may already have done so."""
        self.sockets.pop(socket.sid, None)
        self.unjoined.pop(socket.sid, None)
        self.ended.append(socket.sid)
        with self.queue_lock:
            is_counted, socket.is_counted = socket.is_counted, False
        if is_counted:
            self.guard.admission.closed(socket.address)

    def depart(self, socket: GuardedSocket, reason: str) -> None:
        """Run the disconnect handlers, which may still read the session."""
        try:
            self.handlers["disconnect"](socket.sid, reason)
        finally:
            if not self.guard.connections.of(socket.sid):
                self.departing.pop(socket.sid, None)

    def _get_socket(self, sid: str) -> GuardedSocket:
        socket = self.sockets.get(sid) or self.departing.get(sid)
        if socket is None:
            raise KeyError("Session not found")
        return socket

    def disconnect(self, sid: str | None = None) -> None:
        """Close one session, or all if *sid* is ``None``, like upstream's method."""
        for socket in [self.sockets.get(sid)] if sid is not None else list(self.sockets.values()):
            if socket is not None:
                socket.close(reason=self.reason.SERVER_DISCONNECT)

    def _log_error_once(self, message: str, message_key: str) -> None:
        reason = _REASONS.get(message_key)
        if reason is None or self.socket_class is WatchedSocket:
            super()._log_error_once(message, message_key)
        if reason is None:
            return
        if message_key == "bad-sid" and self._is_elsewhere(message.rpartition(" ")[2]):
            self.guard.telemetry.send(HandshakeRefusal("elsewhere", _ELSEWHERE))
            return
        # A refused origin or version is usually the developer's mistake, so the log shows
        # which one it was.
        detail = message if message_key in _FOR_DEVELOPERS else message_key
        self.guard.telemetry.send(HandshakeRefusal(reason, detail[:200]))

    def _is_elsewhere(self, sid: str) -> bool:
        """Return whether this process never had the session, as far as it remembers."""
        return sid != str(None) and sid not in self.departing and sid not in self.ended
