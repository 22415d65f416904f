"""The guarded side of ``socketio.Manager``: the clients of one process."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from socketio import packet as packets

from ...clients.fan_out import LEAST_RECIPIENTS
from ...clients.send_queue import SendOutcome
from ...events.acknowledgements import AckCallback
from ...events.dispatch import CHARGED_BYTES
from ...telemetry.records import SendLoss
from ..engineio.outgoing import ClientMessage
from ..engineio.server import put_as
from .emission import Emission, as_returned, best_of, is_several
from .encoding import encoded, encoded_event
from .recipients import is_empty_collection
from .rooms import Held, Rooms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ...events.acknowledgements import Question

_MAX_HELD_BYTES = 64 * 1024 * 1024


class GuardedManager(Rooms):
    """Mixed in before ``Manager``; keeps callbacks in a table with deadlines.

    Upstream keeps a client's id counter under key 0 of the same dict in which it looks up the
    ack id that the client sends, and removes an entry only at a local disconnect.
    """

    has_own_delivery = False
    """Whether the application overrides ``_handle_emit``, which every event must then pass."""
    has_own_participants = False
    """Whether the application overrides ``get_participants``."""

    def initialize(self) -> None:
        """Start the guard, if nothing has started it before the first client."""
        self.guard.start()

    def check_observers(self) -> None:
        """Check whether anything observes each message; called regularly. Nothing does here."""

    @property
    def callbacks(self) -> dict[Any, dict[int, Callable[..., object]]]:
        """A copy of the pending callbacks, by session id or room and then by ack id."""
        found: dict[Any, dict[int, Callable[..., object]]] = {}
        for recipient, id, function in self.guard.callbacks.waiting():
            key = tuple(recipient) if isinstance(recipient, list) else recipient
            found.setdefault(key, {})[id] = function
        return found

    @callbacks.setter
    def callbacks(self, value: object) -> None:
        """Ignore *value*: upstream's table is not used."""

    def _generate_ack_id(self, sid: Any, callback: Callable[..., object]) -> int:
        if not isinstance(callback, AckCallback):
            callback = AckCallback(callback)
        return self.guard.callbacks.add(as_returned(sid), callback)

    def trigger_callback(self, sid: Any, id: Any, data: Any) -> None:
        """Pass the acknowledgement of *sid* to the callback *id*; unknown ids are ignored."""
        arguments = tuple(data) if isinstance(data, list | tuple) else ()
        server: Any = self.server
        if not self.guard.callbacks.resolve(id, as_returned(sid), arguments) and server.is_logged:
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
        """Emit to clients of this process, or of all processes with a queue, like upstream.

        Returns:
            The outcome in this process: ``queued`` if the message was queued for at least one of
            its clients. If other processes may have recipients, ``queued`` means that the
            message was published to them.

        Raises:
            TypeError: The message cannot be encoded as JSON; nothing was sent.
            ValueError: The message holds a NaN or an infinity, which JSON does not allow, or
                bytes together with a placeholder for other bytes; nothing was sent.
            OutboxFull: The outbox refused the message; nothing was sent.
        """
        if to is not None:
            room = to
        if not room and is_empty_collection(room):
            return SendOutcome.DROPPED_CLOSED
        emission = Emission(
            event, data, namespace or "/", room, skip_sid, callback, volatile, ready_only
        )
        is_local = kwargs.get("ignore_queue")
        if self.guard.runtime.on_loop():
            emit = self.emit_here if is_local else self.emit_everywhere
            return emit(emission, may_wait=True)
        hand_over = self._hand_over_here if is_local else self._hand_over
        return hand_over(emission.snapshot())

    def _hand_over_here(self, emission: Emission) -> SendOutcome:
        """Encode *emission* to check it, then queue it on the event loop's own thread."""
        encoded(self.server.packet_class, packets.EVENT, emission.body, "/", None)
        self.guard.hand_over(partial(self.emit_here, emission))
        return SendOutcome.QUEUED

    def _hand_over(self, emission: Emission) -> SendOutcome:
        """Do the same for the clients of all processes."""
        return self._hand_over_here(emission)

    def emit_everywhere(self, emission: Emission, *, may_wait: bool = False) -> SendOutcome:
        """Emit to clients of all processes."""
        return self.emit_here(emission, may_wait=may_wait)

    def emit_here(self, emission: Emission, *, may_wait: bool = False) -> SendOutcome:
        """Queue an event for the clients of this process that are in its room."""
        clients: Iterable[tuple[str, str]] = self.clients_in(emission.namespace, emission.room)
        if not clients:
            return SendOutcome.DROPPED_CLOSED
        if emission.skip_sid is not None or emission.is_ready_only:
            clients = self._chosen(clients, emission)
        body = emission.body
        if emission.callback is not None:
            outcomes = [
                self._ask(client, emission, body, emission.callback, may_wait=may_wait)
                for client in clients
            ]
            return best_of(outcomes)
        server: Any = self.server
        if server.takes_packets:
            encode = partial(self._encoded, emission, body)
            clients = list(clients)
            is_patient = may_wait and len(clients) == 1
            return best_of(
                [self._put(*client, encode(), may_wait=is_patient) for client in clients]
            )
        find = server.eio.sockets.get
        message = None
        outcome = SendOutcome.DROPPED_CLOSED
        if self._held:
            early: list[tuple[str, str]] = []
            connected: list[tuple[str, str]] = []
            for client in clients:
                (early if client[0] in self._held else connected).append(client)
            if early:
                message = self._encoded(emission, body)
                outcome = best_of([self._put(*client, message) for client in early])
            clients = connected
        sockets = [socket for _, eio_sid in clients if (socket := find(eio_sid)) is not None]
        if not sockets:
            return outcome
        if message is None:
            message = self._encoded(emission, body)
        fan_out = self.guard.fan_out
        if len(sockets) == 1:
            outcome = sockets[0].put(message, may_wait=may_wait)
        elif fan_out is None or len(sockets) < LEAST_RECIPIENTS:
            outcome = best_of([socket.put(message) for socket in sockets])
        else:
            fan_out.add(message, sockets)
            outcome = SendOutcome.QUEUED
        if may_wait and server.eio.behind:
            for socket in server.eio.behind.intersection(sockets):
                socket.wait_until_not_behind()
        return outcome

    def clients_in(self, namespace: str, room: Any) -> Sequence[tuple[str, str]]:
        """Return (sid, eio_sid) of each client in *room*, or in any of several rooms."""
        if is_several(room) or self.has_own_participants:
            return list(self.get_participants(namespace, room))
        rooms = self.rooms.get(namespace)
        clients = None if rooms is None else rooms.get(room)
        return [] if clients is None else list(clients.items())

    def get_participants(self, namespace: str, room: Any) -> Iterator[tuple[str, str]]:
        """Yield the clients in *room*; unlike upstream, accepts an empty list of rooms."""
        if not is_empty_collection(room):
            yield from super().get_participants(namespace, room)

    def _chosen(
        self, clients: Iterable[tuple[str, str]], emission: Emission
    ) -> Iterator[tuple[str, str]]:
        """Yield the (sid, eio_sid) in *clients* that the emission does not exclude."""
        skipped = emission.skip_sid
        if not isinstance(skipped, list):
            skipped = [skipped]
        find = self.guard.connections.find
        for client in clients:
            if client[0] in skipped:
                continue
            if emission.is_ready_only:
                connection = find(client[0])
                if connection is None or not connection.is_ready:
                    continue
            yield client

    def _ask(
        self,
        client: tuple[str, str],
        emission: Emission,
        body: list[Any],
        callback: Callable[..., object],
        *,
        may_wait: bool,
    ) -> SendOutcome:
        """Queue an event that one client must acknowledge."""
        sid, eio_sid = client
        ack_id = self._generate_ack_id(sid, callback)
        server: Any = self.server
        if server.has_own_sending:
            packet = server.packet_class(
                packets.EVENT, data=body, namespace=emission.namespace, id=ack_id
            )
            with put_as(may_wait=may_wait):
                server._send_packet(eio_sid, packet)
            return SendOutcome.QUEUED
        try:
            message = self._encoded(emission, body, ack_id)
        except BaseException:
            self.guard.callbacks.discard(ack_id, sid)
            raise
        outcome = self._put(sid, eio_sid, message, may_wait=may_wait)
        connection = self.guard.connections.find(sid)
        if connection is not None and connection.reason:
            self.guard.callbacks.lose(ack_id, sid, "gone")  # it is closing and will not answer
        self._read_on(eio_sid)
        return outcome

    def _put(
        self, sid: str, eio_sid: str, message: ClientMessage, *, may_wait: bool = False
    ) -> SendOutcome:
        """Queue *message* for a client, or hold it until the client is connected."""
        server: Any = self.server
        if self._held:
            with self._holding:
                held = self._held.get(sid)
                if held is not None:
                    if held.size > _MAX_HELD_BYTES:
                        self.guard.telemetry.send(SendLoss(1, "slow"))
                        return SendOutcome.DROPPED_SLOW
                    held.messages.append(message)
                    held.size += message.size
                    return SendOutcome.QUEUED
        outcome: SendOutcome = server.put(eio_sid, message, may_wait=may_wait)
        return outcome

    def connect(self, sid: str, namespace: str) -> str:
        """Mark a client as connected, once it has been told so, and send its held messages."""
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
                self._held[sid] = Held()  # new messages must queue behind these
            try:
                for message in held.messages:
                    # Only the client's own connect handler emitted these, so no other waits.
                    server.put(eio_sid, message, may_wait=True, is_own=True)
            except BaseException:  # raised by an overridden method of the application
                with self._holding:
                    self._held.pop(sid, None)
                raise

    def _read_on(self, eio_sid: str) -> None:
        """Resume reading from a client that owes an acknowledgement, past its backpressure."""
        server: Any = self.server
        socket = server.eio.sockets.get(eio_sid)
        if socket is not None:
            socket.recheck_room()

    def ask(self, sid: str, eio_sid: str, question: Question) -> int | None:
        """Send an event that one client of this process must acknowledge.

        Call it on the event loop's own thread only.

        Args:
            sid: Session id in the namespace.
            eio_sid: Session id of the transport.
            question: The event, and the callback for its acknowledgement.

        Returns:
            The ack id in the table of callbacks, or ``None`` if the client has disconnected.
        """
        server: Any = self.server
        namespace, event, arguments, callback, ack_id = question
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
        self, emission: Emission, body: list[Any], ack_id: int | None = None
    ) -> ClientMessage:
        server: Any = self.server
        packet = encoded(server.packet_class, packets.EVENT, body, emission.namespace, ack_id)
        is_large = type(packet) is list or len(packet) >= CHARGED_BYTES
        return ClientMessage.of_socketio(
            packet,
            is_event=ack_id is None,
            is_volatile=emission.is_volatile,
            charge=server.charge(packet) if is_large else None,
        )
