"""The guarded side of ``socketio.Server``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from engineio.exceptions import EngineIOError
from socketio import PubSubManager
from socketio import packet as packets
from socketio.exceptions import ConnectionRefusedError as ConnectionRefused
from socketio.exceptions import TimeoutError as CallTimeout

from ..errors import ConnectionClosed, EventInvalid
from ..hooks import AckCallback, Hooks, Refusal
from ..signals import logger

if TYPE_CHECKING:
    from socketio import Server as _Server
else:
    _Server = object

RESERVED_EVENTS = frozenset({"connect", "disconnect", "*"})
"""Names that are no events of a client: handlers of these are for the server to call.

``"*"`` is here because a catch-all handler takes the first argument of a literal
``"*"`` event for the session id, and so a client could act as any other.
"""


class CallRecipientGone(ConnectionClosed, CallTimeout):
    """``call()`` ended early: its recipient is gone.

    Also the TimeoutError that upstream's ``call`` raises, so that code written
    for that goes on to work.
    """


class GuardedServer(_Server):
    """Goes in front of ``Server``; every packet of a client passes through here."""

    guard: Hooks

    def _trigger_event(self, event: str, namespace: str, *args: Any) -> object:
        call = partial(self._dispatch, event, namespace, args)
        result = self.guard.handlers.run(event, namespace, args[0], call)
        if type(result) is not Refusal:
            return result
        if event == "connect":
            raise ConnectionRefused("Connection rejected by server", result.error)
        return result.reply

    def _dispatch(self, event: str, namespace: str, args: tuple[Any, ...]) -> object:
        """Call the handler of *event*, once.

        Upstream calls a disconnect handler a second time, without the reason,
        after any TypeError.
        """
        handler, handler_args = self._get_event_handler(event, namespace, args)
        if handler is not None:
            return handler(*handler_args)
        handler, handler_args = self._get_namespace_handler(namespace, args)
        if handler is not None:
            return handler.trigger_event(event, *handler_args)
        return self.not_handled

    def _handle_event(self, eio_sid: str, namespace: str | None, id: int | None, data: Any) -> None:
        reason = invalid_event(data)
        if reason is None:
            super()._handle_event(eio_sid, namespace, id, data)
        else:
            self._reject(eio_sid, namespace or "/", id, data, reason)

    def _reject(
        self, eio_sid: str, namespace: str, id: int | None, data: Any, error: EventInvalid
    ) -> None:
        sid = self.manager.sid_from_eio_sid(eio_sid, namespace)
        name = data[0] if isinstance(data, list) and data else data
        refusal = self.guard.handlers.reject(name, namespace, sid, error)
        if id is not None and sid is not None:
            self._acknowledge(eio_sid, namespace, id, refusal.reply)

    def _handle_event_internal(
        self, server: Any, sid: str, eio_sid: str, data: list[Any], namespace: str, id: int | None
    ) -> None:
        reply = self._trigger_event(data[0], namespace, sid, *data[1:])
        if id is None or reply is self.not_handled:
            return
        try:
            self._acknowledge(eio_sid, namespace, id, reply)
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
        packet = self.packet_class(packets.ACK, namespace=namespace, id=id, data=data)
        try:
            self._send_packet(eio_sid, packet)
        except EngineIOError:
            logger.debug("an acknowledgement was not sent: its client is gone")

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
            socketio.exceptions.TimeoutError: No answer within *timeout* seconds.
        """
        recipient = to or sid
        namespace = namespace or "/"
        if recipient is None:
            raise ValueError("Cannot use call() to broadcast.")
        if not self.async_handlers:
            raise RuntimeError("Cannot use call() when async_handlers is False.")
        is_local = ignore_queue or not isinstance(self.manager, PubSubManager)
        if is_local and not any(self.manager.get_participants(namespace, recipient)):
            raise CallRecipientGone("nobody is connected by that session id")
        is_answered = self.guard.event()
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
