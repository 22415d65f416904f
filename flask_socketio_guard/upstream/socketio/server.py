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
from .recipients import Exactly, is_nobody, recipient_of

_OUTPUT_PATIENCE = 0.5  # seconds in which something of an event's output has to leave
_OUTPUT_INTERVAL = 0.005  # seconds


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


class GuardedServer(Leaving):
    """Goes in front of ``Server``: takes what comes, and sends what goes."""

    has_own_sending = False
    """Whether the application overrides how packets are sent."""

    def look(self) -> None:
        """See who wants to know of each packet and event; to be called now and then."""
        self.is_logged = is_logged(self.logger)
        self.manager.look()
        self.eio.look()

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
