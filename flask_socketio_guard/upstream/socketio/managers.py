"""The guarded side of the client managers."""

from __future__ import annotations

import base64
import copy
import logging
from _thread import RLock
from collections import deque
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from socketio import packet as packets

from ...clients.fan_out import LEAST_RECIPIENTS
from ...clients.send_queue import SendOutcome
from ...errors import EventInvalid, RoomInvalid
from ...events.dispatch import CHARGED_BYTES
from ...events.shape import Places
from ...ports import (
    BROADCAST_ANSWER,
    BROADCAST_CALL,
    BROADCAST_PARTICIPANTS,
    AckCallback,
    Awaiting,
    Ports,
)
from ...queue.transport import SEQUENCE_KEY, SEQUENCE_MARK
from ..engineio.outgoing import ClientMessage
from ..engineio.server import put_as
from ..engineio.session_ids import is_session_id
from ..engineio.watched_socket import is_logged
from .encoding import KeptPacket, encoded, encoded_event, encoded_for_queue, without_attachments
from .recipients import check_room, is_nobody

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from socketio import Manager as _Manager
    from socketio import PubSubManager as _PubSubManager

    from ...queue.duplicates import Duplicates
    from ...queue.transport import Arrival
else:
    _Manager = _PubSubManager = object

_CALLBACK_GONE = "guard_callback_gone"
"""Method of a message that says: the client you wait for has left.

Peers without the guard ignore messages whose method they do not know.
"""

_SENT_TO_CLIENTS = frozenset({"emit", BROADCAST_CALL})
_ROOM_CHANGES = frozenset({"enter_room", "leave_room", "close_room"})
_OF_ANOTHER = "the room is the session id of another client"
_VOLATILE = "guard_volatile"
_READY_ONLY = "guard_ready_only"

_MAX_HELD_BYTES = 64 * 1024 * 1024
_MAX_NAME = 100  # characters of what another process is called that are told on
_LONGEST_TAIL = 24  # bytes: a sequence number, and the end of the message


class _Options(NamedTuple):
    is_volatile: bool = False
    is_ready_only: bool = False


_NO_OPTIONS = _Options()


class _Held:
    """What is sent to a client once its connect handler has let it in."""

    __slots__ = ("messages", "size")

    def __init__(self) -> None:
        self.messages: deque[ClientMessage] = deque()
        self.size = 0


class GuardedManager(_Manager):
    """Goes in front of ``Manager``: callbacks wait in a table with deadlines.

    Upstream keeps the id counter of a client under key 0 of the very dict that
    the client's ack id looks up, and frees an entry only at a local disconnect.
    """

    guard: Ports
    has_own_delivery = False
    """Whether the application overrides ``_handle_emit``, and so wants every event to pass it."""
    has_own_participants = False
    """Whether the application overrides ``get_participants``."""
    _rooms_of: dict[tuple[str, str], dict[Any, None]]
    _held: dict[str, _Held]
    """Clients whose connect handlers run, and which have not been told that they are connected."""

    def initialize(self) -> None:
        """Start the guard, if a client is the first to need it."""
        self.guard.start()

    def look(self) -> None:
        """See who wants to know of each message; to be called now and then."""

    def index_rooms(self) -> None:
        """Note the rooms of the clients that are here already."""
        self._held = {}
        self._holding = RLock()  # not gevent's: nobody waits while holding it
        self._rooms_of = {}
        for namespace, rooms in self.rooms.items():
            for room, clients in rooms.items():
                for sid in clients:
                    self._rooms_of.setdefault((sid, namespace), {})[room] = None

    @property
    def callbacks(self) -> dict[Any, dict[int, Callable[..., object]]]:
        """The callbacks that wait, by session id or room and then by id, in a copy."""
        found: dict[Any, dict[int, Callable[..., object]]] = {}
        for recipient, id, function in self.guard.callbacks.waiting():
            key = tuple(recipient) if isinstance(recipient, list) else recipient
            found.setdefault(key, {})[id] = function
        return found

    @callbacks.setter
    def callbacks(self, value: object) -> None:
        """Take no other: upstream's table is not in use."""

    def _generate_ack_id(self, sid: Any, callback: Callable[..., object]) -> int:
        if not isinstance(callback, AckCallback):
            callback = AckCallback(callback)
        return self.guard.callbacks.add(_recipient(sid), callback)

    def trigger_callback(self, sid: Any, id: Any, data: Any) -> None:
        """Hand the answer of *sid* to the callback *id*; unknown ones are ignored."""
        arguments = tuple(data) if isinstance(data, list | tuple) else ()
        server: Any = self.server
        if not self.guard.callbacks.resolve(id, _recipient(sid), arguments) and server.is_logged:
            self._get_logger().warning("Unknown callback received, ignoring.")

    def emit(
        self,
        event: str,
        data: Any,
        namespace: str | None = None,
        room: Any = None,
        skip_sid: Any = None,
        callback: Callable[..., object] | None = None,
        to: Any = None,
        *,
        volatile: bool = False,
        ready_only: bool = False,
        **kwargs: Any,
    ) -> SendOutcome:
        """Emit to clients of this process; as upstream's ``emit``.

        Returns:
            What became of it: ``queued`` if it waits for at least one client.

        Raises:
            TypeError: JSON cannot hold the message; nothing was sent.
            ValueError: It holds a NaN or an infinity, which JSON has not, or bytes and the
                placeholder of other bytes; nothing was sent.
        """
        del kwargs
        if to is not None:
            room = to
        if not room and is_nobody(room):
            return SendOutcome.DROPPED_CLOSED
        options = _Options(volatile, ready_only)
        on_loop = self.guard.runtime.on_loop()
        if not on_loop:
            encoded(self.server.packet_class, packets.EVENT, _body(event, data), "/", None)
            data, room, skip_sid = _snapshot(data), _as_it_is(room), _as_it_is(skip_sid)
        arguments = (event, data, namespace or "/", room, skip_sid, callback, options)
        if on_loop:
            return self._emit_here(*arguments, may_wait=True)
        self.guard.hand_over(partial(self._emit_here, *arguments))
        return SendOutcome.QUEUED

    def _emit_here(
        self,
        event: str,
        data: Any,
        namespace: str,
        room: Any,
        skip_sid: Any,
        callback: Callable[..., object] | None,
        options: _Options,
        *,
        may_wait: bool = False,
    ) -> SendOutcome:
        """Queue an event for those clients of this process that are in *room*."""
        clients: Iterable[tuple[str, str]] = self.clients_in(namespace, room)
        if not clients:
            return SendOutcome.DROPPED_CLOSED
        if skip_sid is not None or options.is_ready_only:
            clients = self._chosen(clients, skip_sid, is_ready_only=options.is_ready_only)
        body = _body(event, data)
        if callback is not None:
            outcomes = [
                self._ask(sid, eio_sid, namespace, body, callback, options, may_wait=may_wait)
                for sid, eio_sid in clients
            ]
            return _best(outcomes)
        server: Any = self.server
        if server.takes_packets:
            encode = partial(self._encoded, namespace, body, options)
            clients = list(clients)
            is_patient = may_wait and len(clients) == 1
            return _best([self._put(*client, encode(), may_wait=is_patient) for client in clients])
        find = server.eio.sockets.get
        message = None
        outcome = SendOutcome.DROPPED_CLOSED
        if self._held:
            early: list[tuple[str, str]] = []
            connected: list[tuple[str, str]] = []
            for client in clients:
                (early if client[0] in self._held else connected).append(client)
            if early:
                message = self._encoded(namespace, body, options)
                outcome = _best([self._put(*client, message) for client in early])
            clients = connected
        sockets = [socket for _, eio_sid in clients if (socket := find(eio_sid)) is not None]
        if not sockets:
            return outcome
        if message is None:
            message = self._encoded(namespace, body, options)
        fan_out = self.guard.fan_out
        if len(sockets) == 1:
            outcome = sockets[0].put(message, may_wait=may_wait)
        elif fan_out is None or len(sockets) < LEAST_RECIPIENTS:
            outcome = _best([socket.put(message) for socket in sockets])
        else:
            fan_out.add(message, sockets)
            outcome = SendOutcome.QUEUED
        if may_wait and server.eio.behind:
            for socket in server.eio.behind.intersection(sockets):
                socket.wait_until_not_behind()
        return outcome

    def clients_in(self, namespace: str, room: Any) -> Sequence[tuple[str, str]]:
        """Return who is in *room*, or in one of several, by the ids of both protocols."""
        if _is_several(room) or self.has_own_participants:
            return list(self.get_participants(namespace, room))
        rooms = self.rooms.get(namespace)
        clients = None if rooms is None else rooms.get(room)
        return [] if clients is None else list(clients.items())

    def get_participants(self, namespace: str, room: Any) -> Iterator[tuple[str, str]]:
        """Yield who is in *room*; as upstream's, which raises for an empty list of rooms."""
        if not is_nobody(room):
            yield from super().get_participants(namespace, room)

    def _chosen(
        self, clients: Iterable[tuple[str, str]], skip_sid: Any, *, is_ready_only: bool
    ) -> Iterator[tuple[str, str]]:
        """Yield those of *clients*, known by the ids of both protocols, who shall get it."""
        skipped = skip_sid if isinstance(skip_sid, list) else [skip_sid]
        find = self.guard.connections.find
        for client in clients:
            if client[0] in skipped:
                continue
            if is_ready_only:
                connection = find(client[0])
                if connection is None or not connection.is_ready:
                    continue
            yield client

    def _ask(
        self,
        sid: str,
        eio_sid: str,
        namespace: str,
        body: list[Any],
        callback: Callable[..., object],
        options: _Options,
        *,
        may_wait: bool,
    ) -> SendOutcome:
        """Queue an event for one client that is to answer it."""
        ack_id = self._generate_ack_id(sid, callback)
        server: Any = self.server
        if server.has_own_sending:
            packet = server.packet_class(packets.EVENT, data=body, namespace=namespace, id=ack_id)
            with put_as(may_wait=may_wait):
                server._send_packet(eio_sid, packet)
            return SendOutcome.QUEUED
        try:
            message = self._encoded(namespace, body, options, ack_id)
        except BaseException:
            self.guard.callbacks.discard(ack_id, sid)
            raise
        outcome = self._put(sid, eio_sid, message, may_wait=may_wait)
        connection = self.guard.connections.find(sid)
        if connection is not None and connection.reason:
            self.guard.callbacks.lose(ack_id, sid, "gone")  # it has left and will not answer
        self._read_on(eio_sid)
        return outcome

    def _put(
        self, sid: str, eio_sid: str, message: ClientMessage, *, may_wait: bool = False
    ) -> SendOutcome:
        """Queue *message* for a client, or hold it until the client is let in."""
        server: Any = self.server
        if self._held:
            with self._holding:
                held = self._held.get(sid)
                if held is not None:
                    if held.size > _MAX_HELD_BYTES:
                        self.guard.telemetry.send_lost(1, "slow")
                        return SendOutcome.DROPPED_SLOW
                    held.messages.append(message)
                    held.size += message.size
                    return SendOutcome.QUEUED
        outcome: SendOutcome = server.put(eio_sid, message, may_wait=may_wait)
        return outcome

    def connect(self, sid: str, namespace: str) -> str:
        """Note that a client is connected, and has been told so; send what was held for it."""
        sid = super().connect(sid, namespace)
        self._let_through(sid, self.eio_sid_from_sid(sid, namespace) or "")
        return sid

    def _let_through(self, sid: str, eio_sid: str) -> None:
        server: Any = self.server
        while True:
            with self._holding:
                held = self._held.get(sid)
                if held is None or not held.messages:
                    self._held.pop(sid, None)
                    return
                self._held[sid] = _Held()  # what is sent meanwhile comes behind
            try:
                for message in held.messages:
                    # That is all that the connect handler emitted: nobody else is held up.
                    server.put(eio_sid, message, may_wait=True, is_own=True)
            except BaseException:  # of what the application puts in the way
                with self._holding:
                    self._held.pop(sid, None)
                raise

    def _read_on(self, eio_sid: str) -> None:
        """Have a client read that owes an answer, whatever else of it waits."""
        server: Any = self.server
        socket = server.eio.sockets.get(eio_sid)
        if socket is not None:
            socket.look_for_answer()

    def ask(
        self,
        sid: str,
        eio_sid: str,
        namespace: str,
        event: str,
        arguments: str,
        callback: Awaiting,
        ack_id: int | None = None,
    ) -> int | None:
        """Send an event to one client of this process that is to acknowledge it; at home only.

        Args:
            sid: Session id in the namespace.
            eio_sid: Session id of its transport.
            namespace: Socket.IO namespace.
            event: Its name.
            arguments: JSON text of a list.
            callback: Called with the answer.
            ack_id: What was returned before, if the callback is that one's.

        Returns:
            What the table of callbacks knows it by; ``None`` if the client is gone.
        """
        server: Any = self.server
        if ack_id is None:
            ack_id = self.guard.callbacks.add(sid, callback)
        if server.is_logged:
            server.logger.info('emitting event "%s" to %s [%s]', event, sid, namespace)
        packet = encoded_event(server.packet_class, event, arguments, namespace, ack_id)
        if server.put(eio_sid, ClientMessage.of_socketio(packet)) is SendOutcome.DROPPED_CLOSED:
            self.guard.callbacks.discard(ack_id, sid)
            return None
        self._read_on(eio_sid)
        return ack_id

    def _encoded(
        self, namespace: str, body: list[Any], options: _Options, ack_id: int | None = None
    ) -> ClientMessage:
        server: Any = self.server
        packet = encoded(server.packet_class, packets.EVENT, body, namespace, ack_id)
        is_large = type(packet) is list or len(packet) >= CHARGED_BYTES
        return ClientMessage.of_socketio(
            packet,
            is_event=ack_id is None,
            is_volatile=options.is_volatile,
            charge=server.charge(packet) if is_large else None,
        )

    def check_room(self, room: Any, namespace: str, sid: str | None = None) -> None:
        """See that *room* is one that may be entered or closed.

        Args:
            room: As the application gave it, who may have it from a client.
            namespace: Where.
            sid: Whose own room it may be.

        Raises:
            RoomInvalid: It is not.
        """
        check_room(room)
        if room != sid and self.is_sid_room(namespace, room):
            raise RoomInvalid(_OF_ANOTHER)

    def enter_room(self, sid: str, namespace: str, room: Any, eio_sid: str | None = None) -> None:
        """Add a client to a room; from any thread.

        Raises:
            RoomInvalid: The room is ``None``, cannot be the key of a dict, or is the session id
                of another client, here or in another process.
        """
        self.check_room(room, namespace, sid)
        if self.guard.runtime.on_loop():
            super().enter_room(sid, namespace, room, eio_sid=eio_sid)
        else:
            self.guard.hand_over(partial(self.enter_room, sid, namespace, room, eio_sid))

    def leave_room(self, sid: str, namespace: str, room: Any) -> None:
        """Take a client out of a room; from any thread.

        Raises:
            RoomInvalid: The room is ``None``, or cannot be the key of a dict.
        """
        check_room(room)
        if self.guard.runtime.on_loop():
            super().leave_room(sid, namespace, room)
        else:
            self.guard.hand_over(partial(self.leave_room, sid, namespace, room))

    def close_room(self, room: Any, namespace: str | None = None) -> None:
        """Take everyone out of a room; from any thread.

        Raises:
            RoomInvalid: As in :meth:`enter_room`.
        """
        self.check_room(room, namespace or "/")
        if self.guard.runtime.on_loop():
            super().close_room(room, namespace)
        else:
            self.guard.hand_over(partial(self.close_room, room, namespace))

    def eio_sid_from_sid(self, sid: str, namespace: str) -> str | None:
        """Return the id of a client's transport, or ``None``; upstream's raises for the last."""
        everybody = self.rooms.get(namespace, {}).get(None)
        eio_sid: str | None = None if everybody is None else everybody.get(sid)
        return eio_sid

    def pre_disconnect(self, sid: str, namespace: str) -> str | None:
        """Note that a client is leaving, also one that is in no table any more."""
        self.pending_disconnect.setdefault(namespace, []).append(sid)
        return self.eio_sid_from_sid(sid, namespace)

    def basic_enter_room(
        self, sid: str, namespace: str, room: Any, eio_sid: str | None = None
    ) -> None:
        """Add a client to a room, and the room to the client."""
        server: Any = self.server
        if room is None and not server.always_connect:
            # It is about to be seen by those who emit, and is not connected yet.
            self._held[sid] = _Held()
            try:
                super().basic_enter_room(sid, namespace, room, eio_sid=eio_sid)
            except BaseException:
                del self._held[sid]
                raise
        else:
            super().basic_enter_room(sid, namespace, room, eio_sid=eio_sid)
        self._rooms_of.setdefault((sid, namespace), {})[room] = None
        if room is not None and room != sid:
            self.guard.entered(sid, room)

    def basic_leave_room(self, sid: str, namespace: str, room: Any) -> None:
        """Take a client out of a room, and the room from the client."""
        super().basic_leave_room(sid, namespace, room)
        rooms = self._rooms_of.get((sid, namespace))
        if rooms is not None:
            rooms.pop(room, None)
            if not rooms:
                del self._rooms_of[sid, namespace]

    def get_rooms(self, sid: str, namespace: str) -> list[Any]:
        """Return the rooms that a client is in."""
        return [room for room in self._rooms_of.get((sid, namespace), ()) if room is not None]

    def basic_disconnect(self, sid: str, namespace: str, **kwargs: Any) -> None:
        """Forget *sid*; nothing that waits for it will be answered.

        Upstream looks through all rooms of the namespace, of which each client has
        one of its own: a thousand clients that leave at once cost a million steps.
        """
        del kwargs
        with self._holding:
            self._held.pop(sid, None)
        for room in list(self._rooms_of.get((sid, namespace), ())):
            self.basic_leave_room(sid, namespace, room)
        for pending in (self.pending_connect, self.pending_disconnect):
            waiting = pending.get(namespace, [])
            if sid in waiting:
                waiting.remove(sid)
                if not waiting:
                    del pending[namespace]
        self.guard.callbacks.lose_recipient(sid, "gone")


class GuardedPubSubManager(GuardedManager, _PubSubManager):
    """Goes in front of ``PubSubManager``: sends through the outbox, is fed by the listener."""

    is_logged = False
    """Whether anybody takes the line that upstream writes of each message."""
    _duplicates: Duplicates

    def initialize(self) -> None:
        """Start the guard, if a client is the first to need it."""
        super().initialize()
        if not self.write_only:
            self._get_logger().info(f"{self.name} backend initialized.")

    def look(self) -> None:
        """See who wants to know of each message; to be called now and then."""
        self.is_logged = is_logged(self._get_logger(), logging.DEBUG)

    def emit(
        self,
        event: str,
        data: Any,
        namespace: str | None = None,
        room: Any = None,
        skip_sid: Any = None,
        callback: Callable[..., object] | None = None,
        to: Any = None,
        *,
        volatile: bool = False,
        ready_only: bool = False,
        **kwargs: Any,
    ) -> SendOutcome:
        """Emit to clients of all processes; as upstream's ``emit``.

        Returns:
            What became of it here, for a client of this process; else that the
            other processes were told.

        Raises:
            TypeError: JSON cannot hold the message; nothing was sent.
            ValueError: It holds a NaN or an infinity, which JSON has not, or bytes and the
                placeholder of other bytes; nothing was sent.
            OutboxFull: The outbox refused the message; nothing was sent.
        """
        if to is not None:
            room = to
        if not room and is_nobody(room):
            return SendOutcome.DROPPED_CLOSED
        namespace = namespace or "/"
        if kwargs.get("ignore_queue"):
            return super().emit(
                event,
                data,
                namespace,
                room,
                skip_sid,
                callback,
                volatile=volatile,
                ready_only=ready_only,
            )
        options = _Options(volatile, ready_only)
        on_loop = self.guard.runtime.on_loop()
        if not on_loop:
            data, room, skip_sid = _snapshot(data), _as_it_is(room), _as_it_is(skip_sid)
        message = self._message(event, data, namespace, room, skip_sid, options)
        arguments = (event, data, message, callback, options)
        if on_loop:
            return self._emit_everywhere(*arguments, may_wait=True)
        encoded_for_queue(self.json, self.server.packet_class, message)
        self.guard.hand_over(partial(self._emit_everywhere, *arguments))
        return SendOutcome.HANDED_TO_QUEUE

    def _message(
        self, event: str, data: Any, namespace: str, room: Any, skip_sid: Any, options: _Options
    ) -> dict[str, Any]:
        """Return what the other processes are told."""
        items = list(data) if isinstance(data, tuple) else [data]
        is_binary = KeptPacket.data_is_binary(items)
        if is_binary:
            items, attachments = without_attachments(items)
            items = [items, *[base64.b64encode(part).decode() for part in attachments]]
        message = {
            "method": "emit",
            "event": event,
            "data": items,
            "binary": is_binary,
            "namespace": namespace,
            "room": room,
            "skip_sid": skip_sid,
            "callback": None,
        }
        if options.is_volatile:
            message[_VOLATILE] = True
        if options.is_ready_only:
            message[_READY_ONLY] = True
        message["host_id"] = self.host_id
        return message

    def _emit_everywhere(
        self,
        event: str,
        data: Any,
        message: dict[str, Any],
        callback: Callable[..., object] | None,
        options: _Options,
        *,
        may_wait: bool = False,
    ) -> SendOutcome:
        room, namespace = message["room"], message["namespace"]
        if callback is None:
            self._publish(message)
        else:
            self._publish_with_callback(message, room, namespace, callback)
            callback = partial(self._return_callback, self.host_id, *message["callback"])
        skip_sid = message["skip_sid"]
        if self.has_own_delivery:
            self._handle_emit(message)
            return SendOutcome.HANDED_TO_QUEUE
        outcome = self._emit_here(
            event, data, namespace, room, skip_sid, callback, options, may_wait=may_wait
        )
        is_here = isinstance(room, str) and room in self.guard.connections
        return outcome if is_here else SendOutcome.HANDED_TO_QUEUE

    def _has_anyone_in(self, namespace: Any, room: Any) -> bool:
        if self.has_own_participants:
            return any(self.get_participants(namespace, room))
        rooms = self.rooms.get(namespace)
        if not rooms:
            return False
        return any(name in rooms for name in room) if _is_several(room) else room in rooms

    def _handle_emit(self, message: dict[str, Any]) -> None:
        # A packet that nobody here gets need not be built.
        room = message.get("room")
        remote = message.get("callback")
        if not self._has_anyone_in(message["namespace"], room):
            if remote is not None and isinstance(room, str) and self.guard.has_departed(room):
                # Whoever asks need not wait until the time is over.
                self._publish(_gone(message.get("host_id"), room, remote[2]))
            return
        callback = None
        if remote is not None and len(remote) == 3:
            callback = partial(self._return_callback, message.get("host_id"), *remote)
        data = message["data"]
        try:
            if message.get("binary"):
                attachments = [base64.b64decode(part) for part in data[1:]]
                data = Places(data[0], len(attachments)).fill(attachments)
            if isinstance(data, list):
                data = data[0] if len(data) == 1 else tuple(data)
            self._emit_here(
                message["event"],
                data,
                message["namespace"],
                room,
                message.get("skip_sid"),
                callback,
                _NO_OPTIONS
                if _VOLATILE not in message and _READY_ONLY not in message
                else _Options(_VOLATILE in message, _READY_ONLY in message),
            )
        except ValueError as exc:
            # A process without the guard has sent what no browser bears: a NaN, or a placeholder
            # of a client's.
            error = EventInvalid(f"the clients cannot be sent it: {exc}")
            self.guard.handlers.reject(message["event"], message["namespace"], None, error)

    def _publish_with_callback(
        self, message: dict[str, Any], room: Any, namespace: str, callback: Callable[..., object]
    ) -> None:
        if room is None:
            raise ValueError("Cannot use callback without a room set.")
        self.guard.listen()
        ack_id = self._generate_ack_id(room, callback)
        message["callback"] = (room, namespace, ack_id)
        try:
            self._publish(message)
        except BaseException:
            self.guard.callbacks.discard(ack_id, _recipient(room))
            raise

    def tell_others(self, message: dict[str, Any]) -> None:
        """Send a message to all other processes; its host id comes last."""
        self._publish(message)

    def _generate_ack_id(self, sid: Any, callback: Callable[..., object]) -> int:
        if isinstance(callback, partial) and callback.func == self._return_callback:
            callback = self._relay(sid, callback)
        return super()._generate_ack_id(sid, callback)

    def _relay(self, sid: str, callback: partial[None]) -> AckCallback:
        """Return a callback that carries the answer of *sid* back to where it was asked."""
        host_id, room, _, ack_id = callback.args

        def lost(reason: str) -> None:
            # In a room others may still answer; a session id has only one bearer.
            if reason != "gone" or room != sid:
                return
            if host_id == self.host_id:
                self.guard.callbacks.lose(ack_id, room, reason)
            else:
                self._publish(_gone(host_id, room, ack_id))

        def answered(*arguments: Any) -> None:
            callback(*arguments)

        # Both run where the client's packets are read or its leaving is handled:
        # an outbox that is full, or an answer that JSON cannot hold, must not end that.
        recording = self.guard.handlers.recording
        return AckCallback(recording(answered), on_lost=recording(lost), is_inline=True)

    def deliver(self, arrival: Arrival) -> None:
        """Act on one message of another process.

        Runs in the listener, and so runs no code of the application: that goes
        to tasks of its own.

        Args:
            arrival: JSON text or a dict, from anyone who can write to the channel.
        """
        if (
            isinstance(arrival, bytes)
            and self._is_own(arrival)
            and self.guard.config.fast
            and not self.is_logged
        ):
            return
        message: Any = arrival if isinstance(arrival, dict) else self._decode(arrival)
        method = message.get("method") if isinstance(message, dict) else None
        if not isinstance(method, str):
            error = EventInvalid("not a message of Socket.IO")
            self.guard.handlers.reject("<queue message>", "", None, error)
            return
        if self.is_logged:
            self._get_logger().debug(f"pubsub message: {method}")
        host_id = message.get("host_id")
        if method == "callback":
            self._handle_callback(message)
        elif method == _CALLBACK_GONE:
            if host_id == self.host_id:
                self.guard.callbacks.lose(message.get("id"), message.get("sid"), "gone")
        elif host_id != self.host_id and not self._is_duplicate(host_id, message, arrival):
            if method == "emit":
                self._handle_emit(message)
            elif method in (BROADCAST_CALL, BROADCAST_PARTICIPANTS, BROADCAST_ANSWER):
                self.guard.take_broadcast_call(message)
            else:
                self._act(method, message)

    def _is_own(self, payload: bytes) -> bool:
        """Say, without decoding it, whether this process published *payload*.

        Upstream puts the host id last, and the sequence number goes behind it.
        What is written differently is decoded, and then found out.
        """
        mark = _own_mark(self.host_id)
        return payload.find(mark, -len(mark) - _LONGEST_TAIL) >= 0

    def check_room(self, room: Any, namespace: str, sid: str | None = None) -> None:
        """See that *room* is none that messages to a client of another process go to."""
        super().check_room(room, namespace, sid)
        if room == sid or not is_session_id(room):
            return
        # That of a client which was here and is gone may go on as the name of a room.
        if room not in self.guard.connections and not self.guard.has_departed(room):
            raise RoomInvalid(_OF_ANOTHER)

    def _act(self, method: str, message: dict[str, Any]) -> None:
        if method == "disconnect":
            if self.is_connected(message.get("sid"), message.get("namespace")):
                # runs the application's disconnect handler
                self.guard.spawn("disconnect", partial(self._handle_disconnect, message))
        elif method in _ROOM_CHANGES:
            try:
                self._check_change(method, message)
            except EventInvalid as exc:
                self.guard.handlers.reject(f"<{method}>", "", None, exc)
            else:
                getattr(self, f"_handle_{method}")(message)

    def _check_change(self, method: str, message: dict[str, Any]) -> None:
        """See that a room is one, which another process, of whatever version, wants changed."""
        room, sid, namespace = message.get("room"), message.get("sid"), message.get("namespace")
        check_room(room)
        if not isinstance(namespace, str):
            raise EventInvalid("not a message of Socket.IO")
        if method == "close_room":
            GuardedManager.check_room(self, room, namespace)
        elif method == "enter_room" and isinstance(sid, str) and sid in self.guard.connections:
            self.check_room(room, namespace, sid)

    def _decode(self, text: object) -> Any:
        try:
            return self.json.loads(text)
        except (TypeError, ValueError, RecursionError):
            return None

    def _is_duplicate(self, host_id: object, message: dict[str, Any], arrival: Arrival) -> bool:
        """Say whether a message was seen before; see :class:`~...queue.duplicates.Duplicates`."""
        sequence = message.get(SEQUENCE_KEY)
        if not isinstance(sequence, int) or not isinstance(host_id, str):
            return False
        content = hash(arrival if isinstance(arrival, bytes | str) else repr(arrival))
        if not self._duplicates.has_seen(host_id, sequence, content):
            return False
        self.guard.telemetry.message_repeated(host_id[:_MAX_NAME], sequence)
        return True


class ThroughOutbox(_PubSubManager):
    """Where messages to other processes go: into the outbox, and not to the broker."""

    guard: Ports

    def _publish(self, data: dict[str, Any]) -> None:
        if data["method"] in _SENT_TO_CLIENTS:
            payload: Any = encoded_for_queue(self.json, self.server.packet_class, data)
        else:
            payload = self.json.dumps(data)
        self.guard.publish(payload if isinstance(payload, bytes) else payload.encode())


class QueuedRedisManager(GuardedPubSubManager, ThroughOutbox):
    """Goes in front of ``RedisManager``, for which the guard has connections of its own."""


@lru_cache(maxsize=16)
def _own_mark(host_id: str) -> bytes:
    """Return what stands between the body of a message of *host_id* and its number."""
    return b'"host_id": "%s"%s' % (host_id.encode(), SEQUENCE_MARK)


def _gone(host_id: object, sid: str, ack_id: object) -> dict[str, Any]:
    """Return what tells a process that nobody will answer it.

    The host id is that of the process asked for, and not last, by which one's own are known.
    """
    return {"method": _CALLBACK_GONE, "host_id": host_id, "sid": sid, "id": ack_id}


def _best(outcomes: list[SendOutcome]) -> SendOutcome:
    """Return what became of a message for whom it went best."""
    for outcome in (SendOutcome.QUEUED, SendOutcome.DROPPED_SLOW):
        if outcome in outcomes:
            return outcome
    return SendOutcome.DROPPED_CLOSED


def _is_several(room: Any) -> bool:
    """Say whether *room* is a collection of rooms; as upstream does."""
    return not isinstance(room, str) and room is not None and hasattr(room, "__len__")


def _as_it_is(room: Any) -> Any:
    """Return *room* such that no collection of rooms changes until it is used."""
    return copy.copy(room) if _is_several(room) else room


def _snapshot(data: Any) -> Any:
    """Return *data* as it is now: it is sent later, and whoever emits it may change it."""
    try:
        return copy.deepcopy(data)
    except Exception:  # noqa: BLE001 - an application's JSON may hold anything
        return data


def _body(event: str, data: Any) -> list[Any]:
    """Return the body of an EVENT packet: a tuple is several arguments."""
    if isinstance(data, tuple):
        return [event, *data]
    return [event] if data is None else [event, data]


def _recipient(room: Any) -> Any:
    """Return *room* as it comes back from another process: JSON knows no tuples."""
    return list(room) if isinstance(room, tuple) else room
