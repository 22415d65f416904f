"""How clients connect to a namespace, and how they disconnect from it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from socketio import packet as packets
from socketio.exceptions import ConnectionRefusedError as ConnectionRefused

from ...errors import RateLimited
from ...telemetry.records import HandshakeRefusal, logger
from ..engineio.violations import TooManyJoins
from .incoming import Incoming

if TYPE_CHECKING:
    from ...clients.connections import Connection

_MAX_NAMESPACES = 100  # of one client at a time


class Joining(Incoming):
    """The part of a guarded server that accepts or refuses clients."""

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
        """Count a CONNECT packet even if it is refused, since each may run a connect handler.

        Raises:
            TooManyJoins: The client sent too many within a minute; it has been told.
        """
        socket = self.eio.sockets.get(eio_sid)
        if socket is not None and not socket.may_join():
            self._refuse_join(eio_sid, namespace, RateLimited("too many connects"))
            raise TooManyJoins("connects", "too many CONNECT packets within a minute")

    def _is_address_limited(self, eio_sid: str, namespace: str) -> bool:
        """Refuse a client whose address sent too many CONNECT packets, and return whether so."""
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
        """Wait until a client's previous connection to the namespace has closed, if it is closing.

        Returns:
            Whether there was one, and it closed within ``CONNECT_TIMEOUT``.
        """
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
        self.guard.telemetry.send(HandshakeRefusal("application"))
        self._drop_waiting(connection)  # while the client can still receive the replies
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
                socket.joined()  # first, because sending the held messages may take a while
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
        except (TypeError, ValueError) as exc:  # a handler may refuse with any object
            self.guard.handlers.fail("connect", namespace, None, exc)
            self._send_packet(eio_sid, refused(data=ConnectionRefused().error_args))

    def get_environ(self, sid: str, namespace: str | None = None) -> Any:
        """Return the WSGI environ of a client, like upstream, even while it disconnects."""
        connection = self.guard.connections.find(sid)
        if connection is None:
            return super().get_environ(sid, namespace)
        return self.environ.get(connection.eio_sid)


class Leaving(Joining):
    """The part of a guarded server that closes connections, each exactly once."""

    is_manager_asked = False
    """Whether the application overrides the manager's ``can_disconnect``."""

    def disconnect(
        self, sid: str, namespace: str | None = None, ignore_queue: bool = False
    ) -> None:
        """Disconnect a client, like upstream's method; idempotent.

        It returns ``None``, as upstream's does, because handlers return its result: that is a
        reply, and in a connect handler the decision to accept the client.
        """
        self.end(sid, namespace, ignore_queue)

    def end(self, sid: str, namespace: str | None = None, ignore_queue: bool = False) -> bool:
        """Disconnect a client.

        Returns:
            Whether this call has begun to disconnect a client of this process. With a message
            queue, a client of another process is disconnected as well, but not reported here.
        """
        if not self.guard.runtime.on_loop():
            # A slow disconnect handler must not block later calls in the loop's queue.
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
        """Close the connection of a client whose transport has disappeared."""
        connection = self.guard.connections.find(sid)
        if connection is not None:
            self._end(connection, self.reason.TRANSPORT_ERROR)

    def _end(self, connection: Connection, reason: str, *, is_told: bool = False) -> bool:
        """Begin to close a connection, and return False if it is closing already.

        While its connect handler runs, the connection is only marked: the handler's result
        decides whether the disconnect handler must run.
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
        """Finish closing a connection once the handlers of all earlier events have begun.

        The last events of a client and its DISCONNECT often arrive in one TCP segment. If no
        event is pending, the disconnect handler has run when this returns.
        """
        if connection.unbegun:
            self.guard.spawn("disconnect", partial(self._depart_later, connection))
        else:
            self._finish(connection)

    def _depart_later(self, connection: Connection) -> None:
        # Handlers that wait for an answer from the client would keep others from beginning.
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
        """Return the socket of an Engine.IO session, or ``None``; it may be closed already."""
        return self.eio.sockets.get(eio_sid) or self.eio.departing.get(eio_sid)

    def _finish(self, connection: Connection) -> None:
        """Run the disconnect handler, once, and remove all entries of the connection."""
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
        # The disconnect handlers of all namespaces run in requests made from this environ.
        if eio_sid not in self.eio.sockets and not self.guard.connections.of(eio_sid):
            self.environ.pop(eio_sid, None)
            self.eio.departing.pop(eio_sid, None)
