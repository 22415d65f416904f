"""What is sent to clients, here and in other processes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import flask

from ..checks import arguments_of, namespace_of, require_seconds
from ..clients.send_queue import SendOutcome, require_sent
from ..errors import ConfigError
from .guards import Capability

if TYPE_CHECKING:
    from ..events.broadcast_ack import BroadcastAnswers

Recipients: TypeAlias = Hashable | Sequence[Hashable]
"""A session id, a room, or a list of rooms."""


class Sending(Capability):
    """Sends events; from any thread."""

    def emit(
        self,
        event: str,
        *args: Any,
        namespace: str | None = None,
        to: Recipients = None,
        room: Recipients = None,
        include_self: bool = True,
        skip_sid: str | Sequence[str] | None = None,
        callback: Callable[..., object] | None = None,
        ignore_queue: bool = False,
        callback_timeout: float | None = None,
        on_timeout: Callable[[], object] | None = None,
        volatile: bool = False,
        ready_only: bool = False,
        strict: bool = False,
    ) -> SendOutcome:
        """Emit an event; as ``SocketIO.emit``, and from any thread.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.
            to: Session id, room, or list of rooms. Only ``None`` is everyone: an empty
                list is nobody, and ``""`` and ``0`` are rooms.
            room: Another name of *to*.
            include_self: Whether the client whose event is being handled gets it too.
            skip_sid: Session ids that do not get it.
            callback: Called with the client's acknowledgement, in a task of its own.
            ignore_queue: Emit to clients of this process only.
            callback_timeout: Longest wait for the acknowledgement, in seconds,
                > 0; ``None`` takes ``SOCKETIO_GUARD_CALLBACK_TIMEOUT``.
            on_timeout: Called, once and in a task of its own, when no
                acknowledgement will come: the time is over or the client is gone.
            volatile: Drop it for a client that does not take at once what is sent.
            ready_only: Send it only to clients whose handshake is done
                (:meth:`handshake`).
            strict: Raise if it was dropped.

        Returns:
            What became of it: ``"queued"`` for a client of this process,
            ``"dropped_closed"`` or ``"dropped_slow"`` if no recipient here gets it,
            ``"handed_to_queue"`` if the other processes were told. For a room,
            the best that became of it for any client here.

        Raises:
            ConnectionClosed: *strict*, and it was dropped.
            TypeError: JSON cannot hold the payload; nothing was sent.
            ValueError: It holds a NaN or an infinity, which JSON has not; nothing was sent.
            OutboxFull: The message queue is away and the outbox is full; nothing was sent.
        """
        guard = self._guards.current()
        if not include_self and not skip_sid:
            skip_sid = flask.request.sid  # type: ignore[attr-defined]
        ack = None
        if callback is not None:
            ack = guard.ack_callback(callback, callback_timeout, on_timeout)
        # An application's own emit() may know none of the options.
        options = {"volatile": volatile, "ready_only": ready_only} if volatile or ready_only else {}
        outcome: SendOutcome = guard.server.emit_and_tell(
            event,
            *args,
            namespace=namespace or "/",
            to=room if to is None else to,
            skip_sid=skip_sid,
            callback=ack,
            ignore_queue=ignore_queue,
            **options,
        )
        return require_sent(outcome) if strict else outcome

    def send(
        self,
        data: Any,
        json: bool = False,
        namespace: str | None = None,
        to: Recipients = None,
        callback: Callable[..., object] | None = None,
        include_self: bool = True,
        skip_sid: str | Sequence[str] | None = None,
        *,
        room: Recipients = None,
        ignore_queue: bool = False,
        callback_timeout: float | None = None,
        on_timeout: Callable[[], object] | None = None,
        volatile: bool = False,
        ready_only: bool = False,
        strict: bool = False,
    ) -> SendOutcome:
        """Send the event ``message``, or ``json``; as ``SocketIO.send``, and see :meth:`emit`."""
        return self.emit(
            "json" if json else "message",
            data,
            namespace=namespace,
            to=to,
            room=room,
            include_self=include_self,
            skip_sid=skip_sid,
            callback=callback,
            ignore_queue=ignore_queue,
            callback_timeout=callback_timeout,
            on_timeout=on_timeout,
            volatile=volatile,
            ready_only=ready_only,
            strict=strict,
        )

    @overload
    def call(
        self,
        event: str,
        *args: Any,
        to: str,
        namespace: str | None = None,
        timeout: float = 60,
        ignore_queue: bool = False,
    ) -> Any: ...

    @overload
    def call(
        self,
        event: str,
        *args: Any,
        room: str,
        namespace: str | None = None,
        timeout: float = 60,
        ignore_queue: bool = False,
    ) -> Any: ...

    def call(
        self,
        event: str,
        *args: Any,
        to: str | None = None,
        room: str | None = None,
        namespace: str | None = None,
        timeout: float = 60,
        ignore_queue: bool = False,
    ) -> Any:
        """Emit to one client and wait for its answer; as ``SocketIO.call``.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments.
            to: Session id of the client.
            room: Another name of *to*.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.
            timeout: Longest wait, in seconds.
            ignore_queue: Look for the client in this process only.

        Returns:
            What the client answered, as JSON has it; a tuple of several values.

        Raises:
            ConnectionClosed: The client is gone; raised as soon as that is known.
            socketio.exceptions.TimeoutError: No answer within *timeout* seconds.
            ValueError: Neither *to* nor *room* is given: everybody cannot answer.
        """
        return self._guards.current().socketio.call(
            event,
            *args,
            namespace=namespace or "/",
            to=room if to is None else to,
            timeout=timeout,
            ignore_queue=ignore_queue,
        )

    def broadcast_call(
        self,
        event: str,
        *args: Any,
        room: str,
        timeout: float = 10.0,
        namespace: str | None = None,
    ) -> BroadcastAnswers:
        """Emit to everybody in a room, in all processes, and wait for their answers.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments.
            room: Session id or room.
            timeout: Longest wait, in seconds, > 0. It ends as soon as everybody has answered,
                where it is known how many processes there are, which Redis tells.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.

        Returns:
            The answers by session id, and who did not answer.

        Raises:
            ConfigError: *room* is no text, or *timeout* not > 0.
            TypeError: JSON cannot hold the payload; nothing was sent.
            ValueError: It holds a NaN or an infinity, which JSON has not; nothing was sent.
        """
        require_seconds("timeout", timeout)
        if not isinstance(room, str):
            raise ConfigError(f"room must be a text, not {room!r}")
        namespace, arguments = namespace_of(namespace), arguments_of(args)
        guard = self._guards.current()
        guard.listen()
        return guard.broadcast_acks.ask(
            event, arguments, room=room, namespace=namespace, timeout=timeout
        )

    def flush(self, timeout: float) -> bool:
        """Wait until everything emitted so far has been taken by the message queue.

        Args:
            timeout: Longest wait in seconds, >= 0.

        Returns:
            Whether it has. Always ``True`` without a message queue.
        """
        return self._guards.current().flush(timeout)
