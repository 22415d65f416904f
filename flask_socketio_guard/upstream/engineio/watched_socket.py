"""A socket whose packets are all reported to a log or to python-socketio's admin UI.

A server's sockets have this class only while something observes them, so it costs nothing
otherwise.
"""

from __future__ import annotations

import json
import logging
from functools import partialmethod
from typing import TYPE_CHECKING, Any

from engineio import packet as packets
from engineio.socket import Socket
from socketio.admin import InstrumentedServer

from ...clients.send_queue import SendOutcome
from .socket import PROBE, PROBE_ANSWER, UPGRADE, GuardedSocket
from .websocket import wants_websocket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from ...clients.fan_out import Batch
    from .outgoing import ClientMessage
    from .websocket_transport import WebSocketTransport

_BINARY = "<binary>"


class WatchedSocket(GuardedSocket):
    """Logs each packet in upstream's words and lets the admin UI count it; uses no fast paths."""

    _tap: _Tap | None = None

    def handle_get_request(self, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        """Respond to a polling request, or serve a WebSocket until it closes."""
        if wants_websocket(environ):
            self._log("%s: Received request to upgrade to %s", "websocket")
        return super().handle_get_request(environ, start_response)

    def handle_post_request(self, environ: WSGIEnvironment) -> None:
        """Handle the packets of a polling request, through the admin UI's method if it has one."""
        observed = self._observed("handle_post_request")
        if observed is None:
            super().handle_post_request(environ)
        else:
            observed(environ)

    def receive(self, pkt: Any) -> None:
        """Log and handle one Engine.IO packet from the client."""
        if pkt.packet_type != packets.MESSAGE:
            self._log_packet("Received", pkt.packet_type, pkt.data)
        super().receive(pkt)

    def _take_message(self, data: Any) -> None:
        self._log_packet("Received", packets.MESSAGE, data)
        super()._take_message(data)

    def write(self, batch: Batch) -> None:
        """Queue a batch of broadcasts one by one; never blocks."""
        for message in batch.messages:
            self._enqueue(message)

    def _enqueue(self, message: ClientMessage, **options: bool) -> SendOutcome:
        outcome = super()._enqueue(message, **options)
        if outcome is SendOutcome.QUEUED:
            self._sent(message)
        return outcome

    def _put_last(self, message: ClientMessage) -> None:
        super()._put_last(message)
        if self._transport is None or not self._transport.is_leaving:
            self._sent(message)

    def _sent(self, message: ClientMessage) -> None:
        for part in message.plain():
            if self._tap is not None:
                self._tap.send(part)
            if not isinstance(part, str):
                self._log_packet("Sending", packets.MESSAGE, part)
            elif (kind := int(part[0])) != packets.NOOP:  # upstream does not log these either
                data = json.loads(part[1:]) if kind == packets.OPEN else part[1:] or None
                self._log_packet("Sending", kind, data)

    def schedule_ping(self) -> None:
        """Send a ping after ``ping_interval``, and let the admin UI record it."""
        observed = self._observed("_send_ping")
        if observed is not None:
            self.server.start_background_task(observed)
        super().schedule_ping()

    def _ping_overdue(self) -> None:
        super()._ping_overdue()
        if self.closed:
            self._log("%s: Client is gone, closing socket")

    def _upgraded(self, *, is_direct: bool) -> None:
        observed = self._observed("_websocket_handler")
        if observed is not None:
            tap = _Tap()
            observed(tap)
            if not is_direct:
                for message in (PROBE, UPGRADE):
                    tap.message = message
                    tap.wait()
                tap.send(PROBE_ANSWER)
            waiting: Any
            for waiting in self.queue:
                for part in waiting.plain():
                    tap.send(part)
            self._tap = tap
        self._log("%s: Upgrade to websocket successful")

    def _has_failed_to_upgrade(self, received: str | bytes | None, *, is_first: bool) -> None:
        if is_first:
            self._log("%s: Failed websocket upgrade, no PING packet")
        else:
            self._log(
                "%s: Failed websocket upgrade, expected UPGRADE packet, received %s instead.",
                received,
            )

    def _read(self, transport: WebSocketTransport, messages: Iterator[str | bytes]) -> None:
        super()._read(transport, messages if self._tap is None else self._tap.pass_on(messages))

    # The admin UI replaces methods of upstream's class and calls the original ones by the
    # mangled names below.

    def _observed(self, name: str) -> Callable[..., Any] | None:
        """Return the method by which the admin UI has replaced upstream's *name*, if it has."""
        if admin_of(self.server) is None:
            return None
        method = vars(Socket)[name]
        return method.__get__(self, type(self)) if isinstance(method, partialmethod) else None

    def _InstrumentedServer__handle_post_request(self, environ: WSGIEnvironment) -> None:
        super().handle_post_request(environ)

    def _InstrumentedServer__websocket_handler(self, _tap: _Tap) -> list[bytes]:
        return []  # the guard serves the WebSocket; the admin UI only wraps the tap

    def _InstrumentedServer__send_ping(self) -> None:
        """Do nothing: the heartbeat sends the ping on its own schedule."""

    def _log_packet(self, verb: str, kind: int, data: Any) -> None:
        name = packets.packet_names[kind] if kind < len(packets.packet_names) else "UNKNOWN"
        shown = _BINARY if isinstance(data, bytes) else data
        self._log(f"%s: {verb} packet %s data %s", name, shown)

    def _log(self, message: str, *args: object) -> None:
        self.server.logger.info(message, self.sid, *args)


class _Tap:
    """A stand-in for the WebSocket, whose methods the admin UI wraps in order to count messages."""

    def __init__(self) -> None:
        self.message: str | bytes | None = None

    def send(self, data: str | bytes) -> None:
        """Do nothing: the message has been queued already."""

    def wait(self) -> str | bytes | None:
        """Return the message that was received last, or ``None`` at the end."""
        return self.message

    def pass_on(self, messages: Iterator[str | bytes]) -> Iterator[str | bytes]:
        """Yield *messages*, each after it was counted; as in upstream, the end counts as well."""
        for self.message in messages:
            self.wait()
            yield self.message
        self.message = None
        self.wait()


def admin_of(engine: Any) -> InstrumentedServer | None:
    """Return the admin UI of an ``engineio.Server``, if it has one."""
    method = vars(Socket)["_websocket_handler"]
    if not isinstance(method, partialmethod) or not method.args:
        return None
    admin = method.args[0]
    return admin if isinstance(admin, InstrumentedServer) and admin.sio.eio is engine else None


def is_logged(logger: Any, level: int = logging.INFO) -> bool:
    """Return whether *logger* accepts records of *level*.

    A logger that is not from the standard library, and cannot tell, counts as accepting them.
    """
    is_enabled = getattr(logger, "isEnabledFor", None)
    return is_enabled is None or bool(is_enabled(level))
