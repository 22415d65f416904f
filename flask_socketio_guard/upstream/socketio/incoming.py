"""Packets from clients: events go to their handlers, acknowledgements to their callbacks."""

from __future__ import annotations

import contextvars
from functools import partial
from typing import TYPE_CHECKING, Any

import flask_socketio
from socketio import packet as packets
from socketio.exceptions import ConnectionRefusedError as ConnectionRefused

from ...errors import EventRejected, OutputTooLarge
from ...events.acknowledgements import Refusal
from ...events.dispatch import Arrival, arriving
from ...events.signatures import fit
from ..engineio.violations import ProtocolViolation
from ..overrides import overrides
from .decoding import attach, decode, invalid_event, name_of, nothing

if TYPE_CHECKING:
    from collections.abc import Callable

    from socketio import Server as _Server

    from ...clients.connections import Connection
    from ...ports import Ports

else:
    _Server = object

_IN_PLACE = frozenset({"connect", "disconnect"})


class _ClientEvent(Arrival):
    """An event from a client, from its arrival until its handler begins."""

    __slots__ = ("_ack_id", "_connection", "_data", "_namespace", "_server", "ordering_key")

    def __init__(
        self, server: Incoming, connection: Connection, packet: Any, ordering_key: object
    ) -> None:
        super().__init__(connection)
        self._server = server
        self._connection = connection
        self._data = packet.data
        self._namespace = connection.namespace
        self._ack_id = packet.id
        self.ordering_key = ordering_key

    @property
    def is_early(self) -> bool:
        return self._connection.is_connecting

    def run(self) -> None:
        connection = self._connection
        arriving.set(self)
        try:
            if connection.is_accepted:
                self._server._handle_event_internal(
                    self._server,
                    connection.sid,
                    connection.eio_sid,
                    self._data,
                    self._namespace,
                    self._ack_id,
                )
            else:
                self.lose()
        finally:
            self.begin()

    def lose(self) -> None:
        connection = self._connection
        error = EventRejected("the connection closed before the event could run", code="gone")
        self._server._reject(
            connection.eio_sid,
            self._namespace,
            self._ack_id,
            connection.sid,
            self._data,
            error,
        )
        self.begin()


def _begin(handler: Callable[..., object], *args: object) -> object:
    """Call a handler that is not Flask-SocketIO's, and record that the event has begun."""
    arrival = arriving.get()
    if arrival is not None:
        arrival.begin()
    return handler(*args)


class Incoming(_Server):
    """The part of a guarded server that handles packets from clients."""

    guard: Ports
    is_logged = False
    """Whether upstream's log line for each event would be emitted."""

    def _trigger_event(self, event: str, namespace: str, *args: Any) -> object:
        call = self._call_for(event, namespace, args)
        if call is None:
            return self.not_handled
        # In threading mode, the call runs in a thread of its own, because of the timeout.
        if event == "connect" and not self._has_test_client:
            call = partial(
                self.guard.runtime.call_with_timeout, call, self.guard.config.connect_timeout
            )
        if event in _IN_PLACE:
            run = partial(self.guard.handlers.run, event, namespace, args[0], call)
            result = self._call_apart(run, event)
        else:
            result = self.guard.handlers.run(event, namespace, args[0], call)
        if type(result) is not Refusal:
            return result
        if event == "connect":
            raise ConnectionRefused("Connection rejected by server", result.error)
        return result.reply

    def _call_for(
        self, event: str, namespace: str, args: tuple[Any, ...]
    ) -> Callable[[], object] | None:
        """Return a call of the handler for *event*, with arguments that fit it, if there is one.

        Upstream instead calls connect and disconnect handlers a second time, with other
        arguments, after any TypeError.
        """
        handler, handler_args = self._get_event_handler(event, namespace, args)
        if handler is not None:
            # Flask-SocketIO's own wrapper fits the arguments and records the beginning itself.
            if getattr(handler, "__globals__", None) is vars(flask_socketio):
                return partial(handler, *handler_args)
            if event in _IN_PLACE:
                handler_args = fit(handler, handler_args)
            return partial(_begin, handler, *handler_args)
        handler, handler_args = self._get_namespace_handler(namespace, args)
        if handler is None:
            return None
        if isinstance(handler, flask_socketio.Namespace):
            return partial(handler.trigger_event, event, *handler_args)
        if event in _IN_PLACE:
            own = getattr(handler, f"on_{event}", None)
            if own is not None and not overrides(type(handler), "trigger_event"):
                handler_args = fit(own, handler_args)
            else:
                handler_args = fit(handler.trigger_event, (event, *handler_args))[1:]
        return partial(_begin, handler.trigger_event, event, *handler_args)

    def _call_apart(self, run: Callable[[], object], event: str) -> object:
        """Call *run*, which calls a handler, in a context that leaks nothing into later calls.

        Most events have a task each. These run in the task of the connection, which may also
        serve requests before and after it.
        """
        runtime = self.guard.runtime
        if self._has_test_client:
            return run()
        if event != "connect":
            context = contextvars.Context()
            # Callbacks of the event loop itself, such as gevent's timers, must not block.
            return runtime.call_apart(run, context) if runtime.can_wait() else context.run(run)
        context = contextvars.copy_context()  # WSGI middleware may have set variables for it
        # Under threads, the timeout already gives it a thread of its own.
        return runtime.call_apart(run, context) if runtime.can_kill else context.run(run)

    # Packets

    def _handle_eio_message(self, eio_sid: str, data: Any) -> None:
        """Handle one message of an Engine.IO session.

        Raises:
            ProtocolViolation: The message is not a Socket.IO packet, or must not be sent now.
        """
        packet = self._decode(eio_sid, data)
        if packet is None:
            return
        if not self._has_test_client or not self.guard.is_propagating:
            self._handle_packet(eio_sid, packet, data)
            return
        handlers = self.guard.handlers
        seen: list[BaseException] = []
        before, handlers.seen = handlers.seen, seen
        try:
            self._handle_packet(eio_sid, packet, data)
        finally:
            handlers.seen = before
        if seen:
            raise seen[0]

    def _handle_packet(self, eio_sid: str, packet: Any, data: Any) -> None:
        kind = packet.packet_type
        if kind in (packets.EVENT, packets.BINARY_EVENT):
            self._take_event(eio_sid, packet, data)
        elif kind in (packets.ACK, packets.BINARY_ACK):
            self._handle_ack(eio_sid, packet.namespace, packet.id, packet.data)
        elif kind == packets.CONNECT:
            self._handle_connect(eio_sid, packet.namespace, packet.data)
        elif kind == packets.DISCONNECT:
            self._handle_disconnect(eio_sid, packet.namespace, self.reason.CLIENT_DISCONNECT)
        else:
            raise ProtocolViolation("packet", f"a Socket.IO packet of type {kind}")

    def _decode(self, eio_sid: str, data: Any) -> Any:
        """Return the packet that *data* completes, or ``None`` if attachments must follow."""
        packet = self._binary_packet.get(eio_sid)
        if packet is not None:
            if not attach(packet, data, max_size=self.eio.max_http_buffer_size):
                return None
            del self._binary_packet[eio_sid]
            return packet
        packet = decode(
            self.packet_class,
            data,
            max_containers=self.guard.config.max_containers,
            pause=nothing if self._has_test_client else self.eio.line.pause,
        )
        if packet.attachment_count:
            packet.text = data
            self._binary_packet[eio_sid] = packet
            return None
        return packet

    def _take_event(self, eio_sid: str, packet: Any, message: Any) -> None:
        namespace = packet.namespace or "/"
        data = packet.data
        sid = self.manager.sid_from_eio_sid(eio_sid, namespace)
        connection = self.guard.connections.find(sid)
        if self.is_logged:
            self.logger.info('received event "%s" from %s [%s]', name_of(data), sid, namespace)
        is_open = connection is not None and connection.is_open
        if connection is None or not (is_open or connection.is_connecting):
            if self.is_logged:
                self.logger.warning("%s is not connected to namespace %s", sid, namespace)
            error = EventRejected("not connected to this namespace", code="gone")
            socket = self.eio.sockets.get(eio_sid)
            # A refused client may have sent the event before it learned of the refusal.
            is_answered = socket is not None and socket.refused_by == namespace
            ack_id = packet.id if is_answered else None
            self._reject(eio_sid, namespace, ack_id, sid, data, error)
            return
        invalid = invalid_event(data)
        if invalid is not None:
            self._reject(eio_sid, namespace, packet.id, sid, data, invalid)
            return
        ordering_key: object = None
        if not self.async_handlers:
            socket = self.eio.sockets.get(eio_sid)
            if is_open and (socket is None or not socket.has_waiting):
                run = partial(
                    self._handle_event_internal, self, sid, eio_sid, data, namespace, packet.id
                )
                self._call_apart(run, data[0])
                return
            ordering_key = ()  # events that wait for the connect handler also stay in order
        elif self.guard.is_ordered(namespace, data[0]):
            ordering_key = (namespace, data[0])
        event = _ClientEvent(self, connection, packet, ordering_key)
        socket = self.eio.sockets.get(eio_sid)
        if socket is None:
            event.lose()
        elif packet.attachments:
            size = sum(map(len, packet.attachments))
            socket.submit(event, packet.text, more_bytes=size, is_early=not is_open)
        else:
            socket.submit(event, message, is_early=not is_open)

    def _handle_ack(self, eio_sid: str, namespace: str | None, id: Any, data: Any) -> None:
        sid = self.manager.sid_from_eio_sid(eio_sid, namespace or "/")
        connection = self.guard.connections.find(sid)
        if connection is None:
            super()._handle_ack(eio_sid, namespace, id, data)
            return
        answer = Arrival(connection)
        token = arriving.set(answer)
        try:
            super()._handle_ack(eio_sid, namespace, id, data)
        finally:
            arriving.reset(token)
            if not answer.is_taken:
                answer.begin()

    def _reject(
        self,
        eio_sid: str,
        namespace: str,
        ack_id: int | None,
        sid: str | None,
        data: Any,
        error: EventRejected,
    ) -> None:
        refusal = self.guard.handlers.reject(name_of(data), namespace, sid, error)
        if ack_id is not None:
            self._acknowledge(eio_sid, namespace, ack_id, refusal.reply)

    def _handle_event_internal(
        self, server: Any, sid: str, eio_sid: str, data: list[Any], namespace: str, id: int | None
    ) -> None:
        limit = self.guard.event_limit
        if limit is not None:
            try:
                limit.hit(eio_sid)
            except EventRejected as exc:
                self._reject(eio_sid, namespace, id, sid, data, exc)
                return
        try:
            reply = self._trigger_event(data[0], namespace, sid, *data[1:])
        except Exception as exc:  # noqa: BLE001 - an overridden method may raise anything
            reply = self.guard.handlers.fail(data[0], namespace, sid, exc).reply
        if id is None or reply is self.not_handled:
            return
        try:
            self._acknowledge(eio_sid, namespace, id, reply)
        except OutputTooLarge as exc:
            self._reject(eio_sid, namespace, id, sid, data, exc)
        except Exception as exc:  # noqa: BLE001 - a handler may return anything
            refusal = self.guard.handlers.fail(data[0], namespace, sid, exc)
            self._acknowledge(eio_sid, namespace, id, refusal.reply)
