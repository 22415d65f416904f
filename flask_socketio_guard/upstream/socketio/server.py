"""The guarded side of ``socketio.Server``."""

from __future__ import annotations

import contextvars
from typing import Any

from socketio import PubSubManager
from socketio import packet as packets
from socketio.exceptions import TimeoutError as CallTimeout

from ...checks import require_plain
from ...clients.send_queue import SendOutcome
from ...core.runtime import clock
from ...errors import ConnectionClosed
from ...events.acknowledgements import AckCallback
from ...events.dispatch import CHARGED_BYTES, Charge, arriving
from ..engineio.outgoing import ClientMessage
from ..engineio.server import put_as, putting
from ..engineio.watched_socket import is_logged
from .encoding import encoded
from .membership import Leaving
from .recipients import Exactly, is_empty_collection, recipient_of

_OUTPUT_PATIENCE = 0.5  # seconds without progress after which an event's output is refused
_OUTPUT_INTERVAL = 0.005  # seconds


_found: contextvars.ContextVar[list[SendOutcome] | None] = contextvars.ContextVar(
    "socketio_guard_outcomes", default=None
)
"""The list to which ``emit`` appends its outcome for `GuardedServer.emit_and_tell`, if any."""


class CallRecipientGone(ConnectionClosed, CallTimeout):
    """``call()`` ended early because its recipient has disconnected.

    Also a subclass of the TimeoutError of upstream's ``call``, so code that catches that keeps
    working.
    """


class CallTooEarly(CallTimeout):
    """``call()`` to a client in that client's own connect handler.

    Nothing is sent to a client before it is accepted, and nothing from it is read while its
    connect handler runs, so it cannot answer. Also a subclass of the TimeoutError that upstream's
    ``call`` raises after its timeout.
    """


class GuardedServer(Leaving):
    """Mixed in before ``Server``; the complete guarded server, which also sends."""

    has_own_sending = False
    """Whether the application overrides a method that sends packets."""

    def check_observers(self) -> None:
        """Check whether anything observes each packet or event; called regularly."""
        self.is_logged = is_logged(self.logger)
        self.manager.check_observers()
        self.eio.check_observers()

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
        # is_own is explicit: the event's request context, which would show it, has ended.
        message = ClientMessage.of_socketio(packet, charge=charge)
        self.put(eio_sid, message, may_wait=True, is_own=True)

    def charge(self, packet: str | bytes | list[Any]) -> Charge | None:
        """Charge a large encoded packet to the current event, if there is one.

        If the event's output has reached its bound, wait as long as some of it is being sent:
        messages that a handler emits to many clients at once have not been written yet.

        Raises:
            OutputTooLarge: The event's unsent output would exceed ``EVENT_OUTPUT_MAX_BYTES``.
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
        """Whether packets must be passed on one by one, as Flask-SocketIO's test client needs."""
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
        """Emit an event, like upstream's ``emit``, but only ``None`` means all clients.

        It returns ``None``, as upstream's does, because the return value of a handler is a reply.
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
        # An application's override of emit() may not accept these options or return an outcome.
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
        """Emit an event, through an application's override of :meth:`emit`, if there is one.

        Returns:
            The outcome in this process, or ``QUEUED`` if an override does not report one.
        """
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
        """Emit to one client and wait for its acknowledgement, like upstream's ``call``.

        Raises:
            ConnectionClosed: The client has disconnected; raised as soon as that is known.
            socketio.exceptions.TimeoutError: The client did not answer within *timeout* seconds,
                or the caller is the connect handler of that client.
            ValueError: There is no recipient.
            RuntimeError: ``async_handlers`` is False.
        """
        recipient = recipient_of(to, sid)
        namespace = namespace or "/"
        if recipient is None:
            raise ValueError("Cannot use call() to broadcast.")
        if not self.async_handlers:
            raise RuntimeError("Cannot use call() when async_handlers is False.")
        if recipient == self.guard.handlers.connecting_sid() and self._cannot_answer_yet(recipient):
            raise CallTooEarly("a client cannot answer before its connect handler has returned")
        is_local = ignore_queue or not isinstance(self.manager, PubSubManager)
        is_empty = is_local and not any(self.manager.get_participants(namespace, recipient))
        if is_empty or is_empty_collection(recipient):
            raise CallRecipientGone("no client with that session id is connected")
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
            raise CallRecipientGone("the client disconnected before it answered")
        raise CallTimeout

    def _cannot_answer_yet(self, sid: str) -> bool:
        """Return whether a client cannot answer while its connect handler runs."""
        connection = self.guard.connections.find(sid)
        if not self.always_connect or connection is None:
            return True
        socket = self.eio.sockets.get(connection.eio_sid)
        return socket is not None and bool(socket.upgraded)
