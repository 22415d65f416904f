"""The guarded side of ``socketio.Server``."""

from __future__ import annotations

import contextvars
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import flask_socketio
from socketio import PubSubManager
from socketio import packet as packets
from socketio.exceptions import ConnectionRefusedError as ConnectionRefused
from socketio.exceptions import TimeoutError as CallTimeout

from ...clients.send_queue import SendOutcome
from ...config import require_plain
from ...core.runtime import clock
from ...errors import ConnectionClosed, EventInvalid, EventRejected, OutputTooLarge, RateLimited
from ...events.dispatch import CHARGED_BYTES, Arrival, Charge, arriving
from ...events.pieces import TimeSlice
from ...events.shape import Places, TooDeep, TooManyContainers, require_shape
from ...events.signatures import fit
from ...ports import AckCallback, Connection, Ports, Refusal
from ...telemetry.records import logger
from ..engineio.outgoing import ClientMessage
from ..engineio.server import put_as, putting
from ..engineio.socket import ProtocolViolation, TooLarge, TooManyJoins
from ..engineio.watched_socket import is_logged
from ..overrides import overrides
from .encoding import IN_PIECES, KeptJSON, decoding_in_pieces, encoded
from .recipients import Exactly, is_nobody, recipient_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from socketio import Server as _Server
else:
    _Server = object

_BINARY = frozenset({packets.BINARY_EVENT, packets.BINARY_ACK})
_MAX_ATTACHMENTS = 64
_MAX_ATTACHMENT_MESSAGES = 8  # the attachments of one packet, in messages of the largest size
_OUTPUT_PATIENCE = 0.5  # seconds in which something of an event's output has to leave
_OUTPUT_INTERVAL = 0.005  # seconds
_MAX_NAMESPACES = 100  # of one client at a time
_CONNECT = packets.Packet(encoded_packet="0")  # to "/" and with no more to say; most are
_IN_PLACE = frozenset({"connect", "disconnect"})

RESERVED_EVENTS = frozenset({"connect", "disconnect", "*"})
"""Names that are no events of a client: handlers of these are for the server to call.

``"*"`` is here because a catch-all handler takes the first argument of a literal
``"*"`` event for the session id, and so a client could act as any other.
"""


_found: contextvars.ContextVar[list[SendOutcome] | None] = contextvars.ContextVar(
    "socketio_guard_outcomes", default=None
)
"""Where the outcome of an emit goes, if somebody wants to know."""


class CallRecipientGone(ConnectionClosed, CallTimeout):
    """``call()`` ended early: its recipient is gone.

    Also the TimeoutError that upstream's ``call`` raises, so that code written
    for that goes on to work.
    """


class CallTooEarly(CallTimeout):
    """``call()`` in a connect handler, to the very client that it is for.

    Nothing is sent to a client before it is let in, and nothing of it is read while its connect
    handler runs, so there will be no answer. Also the TimeoutError that upstream's ``call``
    raises, at the end of its timeout.
    """


class _ClientEvent(Arrival):
    """An event on its way to its handler."""

    __slots__ = ("_ack_id", "_connection", "_data", "_namespace", "_server", "ordering_key")

    def __init__(
        self, server: GuardedServer, connection: Connection, packet: Any, ordering_key: object
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
        error = EventRejected("the connection ended before its turn came", code="gone")
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
    """Call a handler that Flask-SocketIO knows nothing of, and note that it has begun."""
    arrival = arriving.get()
    if arrival is not None:
        arrival.begin()
    return handler(*args)


class GuardedServer(_Server):
    """Goes in front of ``Server``; every packet of a client passes through here."""

    guard: Ports
    is_logged = False
    """Whether anybody takes the lines that upstream writes of each event."""
    has_own_sending = False
    """Whether the application overrides how packets are sent."""
    is_manager_asked = False
    """Whether the application overrides what says who may be disconnected."""

    def _trigger_event(self, event: str, namespace: str, *args: Any) -> object:
        call = self._call_for(event, namespace, args)
        if call is None:
            return self.not_handled
        # In threading mode, a timeout takes a thread of its own.
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
        """Return a call of the handler of *event*, if there is one.

        To be called once: upstream calls connect and disconnect handlers a second time, with
        other arguments, after any TypeError.
        """
        handler, handler_args = self._get_event_handler(event, namespace, args)
        if handler is not None:
            # Flask-SocketIO's own fits the arguments itself, and says when it begins.
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

    def look(self) -> None:
        """See who wants to know of each packet and event; to be called now and then."""
        self.is_logged = is_logged(self.logger)
        self.manager.look()
        self.eio.look()

    def _call_apart(self, run: Callable[[], object], event: str) -> object:
        """Call *run*, which leads to a handler, such that nothing of it is left to another.

        Other events have a task each. These come in the task of the connection, which may be
        that of requests before and after it.
        """
        runtime = self.guard.runtime
        if self._has_test_client:
            return run()
        if event != "connect":
            context = contextvars.Context()
            # What the event loop itself calls, such as a timer of gevent, may not wait.
            return runtime.call_apart(run, context) if runtime.can_wait() else context.run(run)
        context = contextvars.copy_context()  # middleware in front may have left something for it
        # A thread has been made for the sake of its timeout.
        return runtime.call_apart(run, context) if runtime.can_kill else context.run(run)

    # Packets

    def _handle_eio_message(self, eio_sid: str, data: Any) -> None:
        """Act on one message of a transport session.

        Raises:
            ProtocolViolation: It is no packet of Socket.IO, or not now.
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
        """Return the packet that *data* completes; ``None`` if attachments are to follow."""
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
            pause=_nothing if self._has_test_client else self.eio.line.pause,
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
            self.logger.info('received event "%s" from %s [%s]', _name_of(data), sid, namespace)
        is_open = connection is not None and connection.is_open
        if connection is None or not (is_open or connection.is_connecting):
            if self.is_logged:
                self.logger.warning("%s is not connected to namespace %s", sid, namespace)
            error = EventRejected("not connected to this namespace", code="gone")
            socket = self.eio.sockets.get(eio_sid)
            # Who was refused may have sent it before that was known.
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
            ordering_key = ()  # what waits for the connect handler is handled in order, too
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
        refusal = self.guard.handlers.reject(_name_of(data), namespace, sid, error)
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
        except Exception as exc:  # noqa: BLE001 - the application's own one may raise anything
            reply = self.guard.handlers.fail(data[0], namespace, sid, exc).reply
        if id is None or reply is self.not_handled:
            return
        try:
            self._acknowledge(eio_sid, namespace, id, reply)
        except OutputTooLarge as exc:
            self._reject(eio_sid, namespace, id, sid, data, exc)
        except Exception as exc:  # noqa: BLE001 - what a handler returns may hold anything
            refusal = self.guard.handlers.fail(data[0], namespace, sid, exc)
            self._acknowledge(eio_sid, namespace, id, refusal.reply)

    def _acknowledge(self, eio_sid: str, namespace: str, id: int, reply: object) -> None:
        if reply is None:
            data: list[object] = []
        elif isinstance(reply, tuple):
            data = list(reply)
        else:
            data = [reply]
        if self.has_own_sending:
            with put_as(may_wait=True, is_own=True):
                self._send_packet(
                    eio_sid, self.packet_class(packets.ACK, data=data, namespace=namespace, id=id)
                )
            return
        packet = encoded(self.packet_class, packets.ACK, data, namespace, id)
        is_large = type(packet) is list or len(packet) >= CHARGED_BYTES
        charge = self.charge(packet) if is_large else None
        # The request context of the event, by which its own are known, has ended.
        message = ClientMessage.of_socketio(packet, charge=charge)
        self.put(eio_sid, message, may_wait=True, is_own=True)

    def charge(self, packet: str | bytes | list[Any]) -> Charge | None:
        """Count an encoded packet as what the present event has caused, if it is for one.

        At the bound it waits as long as some of that leaves: what a handler emits to many clients
        in one go has not had its turn yet.

        Raises:
            OutputTooLarge: That would be too much at a time.
        """
        arrival = arriving.get()
        if arrival is None:
            return None
        size = sum(map(len, packet)) if isinstance(packet, list) else len(packet)
        if size < CHARGED_BYTES:
            return None
        bound, runtime = self.guard.config.event_output_max_bytes, self.guard.runtime
        if size <= bound < arrival.output + size and runtime.can_wait():
            least, give_up_at = arrival.output, clock() + _OUTPUT_PATIENCE
            while arrival.output + size > bound and clock() < give_up_at:
                runtime.sleep(_OUTPUT_INTERVAL)
                if arrival.output < least:
                    least, give_up_at = arrival.output, clock() + _OUTPUT_PATIENCE
        return arrival.charge(size, bound)

    def _send_packet(self, eio_sid: str | None, pkt: Any) -> None:
        self.eio.put(eio_sid, ClientMessage.of_socketio(pkt.encode()), **putting.get())

    @property
    def _has_test_client(self) -> bool:
        return "_send_eio_packet" in self.__dict__

    @property
    def takes_packets(self) -> bool:
        """Whether something takes packets one by one: Flask-SocketIO's test client, for one."""
        return self.has_own_sending or self._has_test_client

    def put(self, eio_sid: str, message: ClientMessage, **how: bool) -> SendOutcome:
        """Queue *message* for a client; see :meth:`GuardedSocket.put`."""
        if not self.takes_packets:
            outcome: SendOutcome = self.eio.put(eio_sid, message, **how)
            return outcome
        with put_as(**how):
            for packet in message.packets():
                self._send_eio_packet(eio_sid, packet)
        return SendOutcome.QUEUED

    # Connections

    def _handle_connect(self, eio_sid: str, namespace: str | None, data: Any) -> None:
        namespace = namespace or "/"
        self._count_join(eio_sid, namespace)
        if self._is_address_limited(eio_sid, namespace):
            return
        # Source: Socket.IO protocol v5, CONNECT_ERROR: the payload is an object with a message.
        if not self._serves(namespace):
            self._send_refusal(eio_sid, namespace, {"message": "Invalid namespace"})
            return
        sid = None
        if len(self.guard.connections.of(eio_sid)) < _MAX_NAMESPACES:
            sid = self.manager.pre_connect(eio_sid, namespace)
            if sid is None and self._has_left(eio_sid, namespace):
                sid = self.manager.pre_connect(eio_sid, namespace)
        if sid is None:
            self._send_refusal(eio_sid, namespace, {"message": "Unable to connect"})
            return
        connection = self.guard.connections.add(sid, namespace, eio_sid)
        if self.always_connect:
            self._send_connected(eio_sid, namespace, sid)
            self.manager.connect(sid, namespace)
        try:
            environ = self.environ.get(eio_sid)
            success = self._trigger_event("connect", namespace, sid, environ, data or None)
            reason = None
        except ConnectionRefused as exc:
            success, reason = False, exc.error_args
        except ConnectionRefusedError:
            success, reason = False, {"message": "Connection refused by server"}
        except Exception as exc:  # noqa: BLE001 - as for events
            refusal = self.guard.handlers.fail("connect", namespace, sid, exc)
            refused = ConnectionRefused("Connection rejected by server", refusal.error)
            success, reason = False, refused.error_args
        if success is False:
            self._refuse(connection, reason or ConnectionRefused().error_args)
        else:
            self._accept(connection)

    def _count_join(self, eio_sid: str, namespace: str) -> None:
        """Count a CONNECT packet, whatever becomes of it: each may run a connect handler.

        Raises:
            TooManyJoins: There were too many within a minute; the client has been told.
        """
        socket = self.eio.sockets.get(eio_sid)
        if socket is not None and not socket.may_join():
            self._refuse_join(eio_sid, namespace, RateLimited("too many connects"))
            raise TooManyJoins("connects", "more than so many CONNECT packets within a minute")

    def _is_address_limited(self, eio_sid: str, namespace: str) -> bool:
        """Say whether too many CONNECT packets came from a client's address; it is told then."""
        limit, socket = self.guard.join_limit, self.eio.sockets.get(eio_sid)
        if limit is None or socket is None or not socket.address:
            return False
        try:
            limit.hit(socket.address)
        except RateLimited as exc:
            exc.message = "too many connects from this address"
            self._refuse_join(eio_sid, namespace, exc)
            return True
        return False

    def _refuse_join(self, eio_sid: str, namespace: str, exc: RateLimited) -> None:
        error = self.guard.handlers.reject("connect", namespace, None, exc).error
        refused = ConnectionRefused("Connection rejected by server", error)
        self._send_refusal(eio_sid, namespace, refused.error_args)

    def _has_left(self, eio_sid: str, namespace: str) -> bool:
        """Wait for the end of a client's former connection, which it has left, to a namespace."""
        for connection in self.guard.connections.of(eio_sid):
            if connection.namespace == namespace and connection.reason:
                is_closed = self.guard.flag()
                connection.defer(is_closed.set)
                return is_closed.wait(self.guard.config.connect_timeout)
        return False

    def _serves(self, namespace: str) -> bool:
        return (
            namespace in self.handlers
            or namespace in self.namespace_handlers
            or self.namespaces == "*"
            or namespace in self.namespaces
        )

    def _refuse(self, connection: Connection, reason: Any) -> None:
        sid, namespace, eio_sid = connection.sid, connection.namespace, connection.eio_sid
        self.guard.telemetry.handshake_refused("application")
        self._drop_waiting(connection)  # while the client still hears the answers
        if self.always_connect:
            self.manager.pre_disconnect(sid, namespace)
            self._send_refusal(eio_sid, namespace, reason, packets.DISCONNECT)
        else:
            self._send_refusal(eio_sid, namespace, reason)
        self.manager.disconnect(sid, namespace, ignore_queue=True)
        connection.refuse()
        self._drop_waiting(connection)
        socket = self.eio.sockets.get(eio_sid)
        if socket is not None:
            socket.refused_by = namespace
        self._forget_environ(eio_sid)

    def _accept(self, connection: Connection) -> None:
        sid, namespace, eio_sid = connection.sid, connection.namespace, connection.eio_sid
        socket = self._socket_of(eio_sid)
        if not self.always_connect:
            self._send_connected(eio_sid, namespace, sid)
            if socket is not None:
                socket.joined()  # what was held for it may take its time
            self.manager.connect(sid, namespace)
        is_open = connection.accept()
        if socket is not None:
            socket.release(connection)
        if is_open:
            if socket is not None:
                socket.joined()
            self.guard.connected(connection)
        else:
            # It was closed while its connect handler ran.
            self._send_packet(eio_sid, self.packet_class(packets.DISCONNECT, namespace=namespace))
            self._depart(connection)

    def _send_connected(self, eio_sid: str, namespace: str, sid: str) -> None:
        self._send_packet(
            eio_sid, self.packet_class(packets.CONNECT, {"sid": sid}, namespace=namespace)
        )

    def _send_refusal(
        self, eio_sid: str, namespace: str, reason: Any, kind: int = packets.CONNECT_ERROR
    ) -> None:
        refused = partial(self.packet_class, kind, namespace=namespace)
        try:
            self._send_packet(eio_sid, refused(data=reason))
        except (TypeError, ValueError) as exc:  # what a handler refuses with may hold anything
            self.guard.handlers.fail("connect", namespace, None, exc)
            self._send_packet(eio_sid, refused(data=ConnectionRefused().error_args))

    def get_environ(self, sid: str, namespace: str | None = None) -> Any:
        """Return the WSGI environ of a client; as upstream's."""
        connection = self.guard.connections.find(sid)
        if connection is None:
            return super().get_environ(sid, namespace)
        return self.environ.get(connection.eio_sid)

    def disconnect(
        self, sid: str, namespace: str | None = None, ignore_queue: bool = False
    ) -> None:
        """Disconnect a client; as upstream's, and idempotent.

        It returns nothing, as upstream's: what a handler returns is an answer, and that of a
        connect handler a decision.
        """
        self.end(sid, namespace, ignore_queue)

    def end(self, sid: str, namespace: str | None = None, ignore_queue: bool = False) -> bool:
        """Disconnect a client.

        Returns:
            Whether a client of this process is now being disconnected because
            of this call. One that is elsewhere is, too, if there is a message queue.
        """
        if not self.guard.runtime.on_loop():
            # A disconnect handler may take its time, and others are handed over behind it.
            leave = partial(self.disconnect, sid, namespace, ignore_queue)
            self.guard.hand_over(partial(self.guard.spawn, "disconnect", leave))
            return sid in self.guard.connections
        namespace = namespace or "/"
        connection = self.guard.connections.find(sid)
        if connection is None or connection.namespace != namespace:
            logger.debug("disconnect: no such client here")
            if not ignore_queue:
                self.manager.can_disconnect(sid, namespace)  # asks the other processes
            return False
        if (
            self.is_manager_asked
            and not ignore_queue
            and not self.manager.can_disconnect(sid, namespace)
        ):
            return False
        return self._end(connection, self.reason.SERVER_DISCONNECT, is_told=True)

    def _handle_disconnect(
        self, eio_sid: str, namespace: str | None, reason: str | None = None
    ) -> None:
        sid = self.manager.sid_from_eio_sid(eio_sid, namespace or "/")
        connection = self.guard.connections.find(sid)
        if connection is not None:
            self._end(connection, reason or self.reason.CLIENT_DISCONNECT)

    def _handle_eio_disconnect(self, eio_sid: str, reason: str) -> None:
        self._binary_packet.pop(eio_sid, None)
        for connection in self.guard.connections.of(eio_sid):
            self._handle_disconnect(eio_sid, connection.namespace, reason)
            self._end(connection, reason)  # the manager may have lost it
        self._forget_environ(eio_sid)

    def drop(self, sid: str) -> None:
        """Close the connection of a client whose transport is gone."""
        connection = self.guard.connections.find(sid)
        if connection is not None:
            self._end(connection, self.reason.TRANSPORT_ERROR)

    def _end(self, connection: Connection, reason: str, *, is_told: bool = False) -> bool:
        """Close a connection, unless that is being done already.

        While the connect handler runs it is only marked: whether the disconnect
        handler has to run is decided by what the connect handler says.
        """
        if not connection.begin_close(reason):
            return False
        if is_told and self.is_logged:
            self.logger.info("Disconnecting %s [%s]", connection.sid, connection.namespace)
        if connection.is_left_to_connect:
            return True
        if is_told:
            self._send_packet(
                connection.eio_sid,
                self.packet_class(packets.DISCONNECT, namespace=connection.namespace),
            )
        self._depart(connection)
        return True

    def _depart(self, connection: Connection) -> None:
        """Carry out the end of a connection, once all that was received before has begun.

        The last words of a client, and its departure, often are in one TCP segment. Where
        nothing waits the disconnect handler has run when this returns.
        """
        if connection.unbegun:
            self.guard.spawn("disconnect", partial(self._depart_later, connection))
        else:
            self._finish(connection)

    def _depart_later(self, connection: Connection) -> None:
        # Handlers that ask a client which has left keep others from beginning.
        self.guard.callbacks.lose_recipient(connection.sid, "gone")
        patience = self.guard.config.departure_timeout
        if not connection.wait_until_begun(self.guard.flag(), patience):
            self._drop_waiting(connection)
        self._finish(connection)

    def _drop_waiting(self, connection: Connection) -> None:
        socket = self._socket_of(connection.eio_sid)
        if socket is not None:
            socket.drop(connection)

    def _socket_of(self, eio_sid: str) -> Any:
        """Return the socket of a transport session, also of one that has ended."""
        return self.eio.sockets.get(eio_sid) or self.eio.departing.get(eio_sid)

    def _finish(self, connection: Connection) -> None:
        """Run the disconnect handler, once, and leave nothing behind."""
        sid, namespace = connection.sid, connection.namespace
        try:
            self.manager.pre_disconnect(sid, namespace=namespace)
        except KeyError:
            logger.debug("disconnect: the manager had lost the client")
        try:
            self._trigger_event("disconnect", namespace, sid, connection.reason)
        except Exception as exc:  # noqa: BLE001 - as for events
            self.guard.handlers.fail("disconnect", namespace, sid, exc)
        try:
            self.manager.disconnect(sid, namespace, ignore_queue=True)
        finally:
            connection.finish()
            self._forget_environ(connection.eio_sid)

    def _forget_environ(self, eio_sid: str) -> None:
        # The disconnect handlers of all namespaces run in requests made of it.
        if eio_sid not in self.eio.sockets and not self.guard.connections.of(eio_sid):
            self.environ.pop(eio_sid, None)
            self.eio.departing.pop(eio_sid, None)

    # Sending

    def emit(
        self,
        event: str,
        data: Any = None,
        to: Any = None,
        room: Any = None,
        skip_sid: Any = None,
        namespace: str | None = None,
        callback: Any = None,
        ignore_queue: bool = False,
        *,
        volatile: bool = False,
        ready_only: bool = False,
    ) -> None:
        """Emit an event; as upstream's ``emit``, but only ``None`` is everybody.

        It returns nothing, as upstream's: what a handler returns is an answer.
        """
        if callback is not None:
            require_plain("the callback", callback)
        if to is not None:
            room = to
        if type(room) is Exactly:
            room = room.recipient
        namespace = namespace or "/"
        if self.is_logged:
            everybody = "all" if room is None else room
            self.logger.info('emitting event "%s" to %s [%s]', event, everybody, namespace)
        # An application's own emit() may know none of the options, and return nothing.
        options = {"volatile": volatile, "ready_only": ready_only} if volatile or ready_only else {}
        outcome: SendOutcome | None = self.manager.emit(
            event,
            data,
            namespace,
            room=room,
            skip_sid=skip_sid,
            callback=callback,
            ignore_queue=ignore_queue,
            **options,
        )
        found = _found.get()
        if found is not None and outcome is not None:
            found.append(outcome)

    def emit_and_tell(self, event: str, *args: Any, **kwargs: Any) -> SendOutcome:
        """Emit an event, through whatever overrides :meth:`emit`, and return its outcome."""
        found: list[SendOutcome] = []
        token = _found.set(found)
        try:
            self.emit(event, *args, **kwargs)
        finally:
            _found.reset(token)
        return found[-1] if found else SendOutcome.QUEUED

    def call(
        self,
        event: str,
        data: Any = None,
        to: str | None = None,
        sid: str | None = None,
        namespace: str | None = None,
        timeout: float = 60,
        ignore_queue: bool = False,
    ) -> Any:
        """Emit to one client and wait for its answer; as upstream's ``call``.

        Raises:
            ConnectionClosed: The client is gone; raised as soon as that is known.
            socketio.exceptions.TimeoutError: No answer within *timeout* seconds, or the caller is
                the connect handler for that client.
        """
        recipient = recipient_of(to, sid)
        namespace = namespace or "/"
        if recipient is None:
            raise ValueError("Cannot use call() to broadcast.")
        if not self.async_handlers:
            raise RuntimeError("Cannot use call() when async_handlers is False.")
        if recipient == self.guard.handlers.connecting_sid() and self._is_deaf_to(recipient):
            raise CallTooEarly("a client cannot answer before its connect handler has let it in")
        is_local = ignore_queue or not isinstance(self.manager, PubSubManager)
        is_empty = is_local and not any(self.manager.get_participants(namespace, recipient))
        if is_empty or is_nobody(recipient):
            raise CallRecipientGone("nobody is connected by that session id")
        is_answered = self.guard.flag()
        answers: list[tuple[Any, ...]] = []
        losses: list[str] = []

        def answered(*arguments: Any) -> None:
            answers.append(arguments)
            is_answered.set()

        def lost(reason: str) -> None:
            losses.append(reason)
            is_answered.set()

        callback = AckCallback(answered, timeout, lost, is_inline=True)
        self.emit(
            event,
            data=data,
            room=recipient,
            namespace=namespace,
            callback=callback,
            ignore_queue=ignore_queue,
        )
        is_answered.wait(timeout)
        if answers:
            answer = answers[0]
            return answer if len(answer) > 1 else answer[0] if answer else None
        if losses and losses[0] != "expired":
            raise CallRecipientGone("the client left before it answered")
        raise CallTimeout

    def _is_deaf_to(self, sid: str) -> bool:
        """Say whether nothing of a client is read while its connect handler runs."""
        connection = self.guard.connections.find(sid)
        if not self.always_connect or connection is None:
            return True
        socket = self.eio.sockets.get(connection.eio_sid)
        return socket is not None and bool(socket.upgraded)


def _nothing() -> None:
    """Do nothing."""


def decode(
    packet_class: Any, data: Any, *, max_containers: int, pause: Callable[[], object] = _nothing
) -> Any:
    """Return a packet, without its attachments.

    Args:
        packet_class: That of the server.
        data: What the client sent.
        max_containers: Lists and objects that it may hold.
        pause: Lets others have their turn, while a large one is decoded.

    Raises:
        ProtocolViolation: *data* is none.
    """
    if not data:
        raise ProtocolViolation("packet", "empty")
    if data == "0" and packet_class.decode is packets.Packet.decode:
        return _CONNECT
    if packet_class.uses_binary_events and not isinstance(data, str):
        raise ProtocolViolation("attachments", "nobody announced one")
    take_turn = TimeSlice(pause).check if len(data) >= IN_PIECES else _nothing
    try:
        if len(data) >= IN_PIECES and packet_class.json is KeptJSON:
            with decoding_in_pieces(max_containers=max_containers, take_turn=take_turn):
                packet = packet_class(encoded_packet=data)
        else:
            if isinstance(data, str):
                require_shape(data, max_containers=max_containers)
            packet = packet_class(encoded_packet=data)
    except TooManyContainers as exc:
        raise TooLarge("size", str(exc)) from exc
    except TooDeep as exc:
        raise ProtocolViolation("packet", str(exc)) from exc
    except Exception as exc:
        raise ProtocolViolation("packet", f"not a Socket.IO packet: {exc}") from exc
    count = packet.attachment_count
    if count:
        if count > _MAX_ATTACHMENTS or packet.packet_type not in _BINARY:
            raise ProtocolViolation("attachments", f"{count} announced")
        try:
            packet.places = Places(packet.data, count, take_turn=take_turn)
        except ValueError as exc:
            raise ProtocolViolation("attachments", str(exc)) from exc
    return packet


def attach(packet: Any, data: Any, *, max_size: int) -> bool:
    """Add an attachment to a packet.

    Returns:
        Whether it was the last.

    Raises:
        ProtocolViolation: *data* is none, does not fit, or is too large.

    Source:
        Socket.IO protocol v5, "Packet encoding": a packet with attachments is
        followed by just as many binary messages.
    """
    if not isinstance(data, (bytes, bytearray)):
        raise ProtocolViolation("attachments", "text instead of an attachment")
    size = len(data) + sum(map(len, packet.attachments))
    if size > _MAX_ATTACHMENT_MESSAGES * max_size:
        raise ProtocolViolation("attachments", "too large together")
    if not _is_put_together_here(packet.__class__):
        try:
            return bool(packet.add_attachment(data))
        except Exception as exc:
            raise ProtocolViolation("attachments", f"do not fit: {exc}") from exc
    packet.attachments.append(data)
    if len(packet.attachments) < packet.attachment_count:
        return False
    packet.data = packet.places.fill(packet.attachments)
    return True


@lru_cache(maxsize=16)
def _is_put_together_here(packet_class: Hashable) -> bool:
    """Say whether the application leaves it to upstream to put packets together."""
    return all(
        getattr(getattr(packet_class, name), "__func__", getattr(packet_class, name))
        is getattr(getattr(packets.Packet, name), "__func__", getattr(packets.Packet, name))
        for name in ("add_attachment", "reconstruct_binary", "_reconstruct_binary_internal")
    )


def _name_of(data: object) -> object:
    return data[0] if isinstance(data, list) and data else data


def invalid_event(data: object) -> EventInvalid | None:
    """Say what is wrong with *data*, the decoded body of an EVENT packet.

    Returns:
        ``None`` if it is a list that begins with a name, and the name is not reserved.

    Source:
        Socket.IO protocol v5, EVENT: a non-empty array whose first item is the event's name.
    """
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        return EventInvalid("an event is a list that begins with its name")
    if data[0] in RESERVED_EVENTS:
        return EventInvalid("this event name is reserved", code="reserved_event")
    return None
