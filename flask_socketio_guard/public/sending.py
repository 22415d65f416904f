"""Sending events to clients of this and other processes."""

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
    """Sends events from any thread."""

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
        """Emit an event; like ``SocketIO.emit``, but safe from any thread.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments.
            namespace: Socket.IO namespace; ``None`` means ``"/"``.
            to: Session id, room, or list of rooms. Only ``None`` means everyone: an empty
                list means nobody, and ``""`` and ``0`` are rooms.
            room: Alias of *to*.
            include_self: Whether the client whose event is being handled receives it too.
            skip_sid: Session ids of clients that do not receive it.
            callback: Called with the client's acknowledgement, in a task of its own.
            ignore_queue: Emit to clients of this process only.
            callback_timeout: Longest wait for the acknowledgement in seconds,
                > 0; ``None`` uses ``SOCKETIO_GUARD_CALLBACK_TIMEOUT``.
            on_timeout: Called once, in a task of its own, when no acknowledgement
                will come: after the timeout, or because the client is gone.
            volatile: Drop the event for a client that does not keep up with earlier messages.
            ready_only: Send it only to clients that have completed their handshake
                (:meth:`handshake`).
            strict: Raise if the event was dropped.

        Returns:
            The outcome: ``"queued"`` for a client of this process,
            ``"dropped_closed"`` or ``"dropped_slow"`` if no recipient in this process
            receives it, ``"handed_to_queue"`` if it was published to the other processes.
            For a room, the best outcome of any client in this process.

        Raises:
            ConnectionClosed: The event was dropped and *strict* is set.
            TypeError: The payload cannot be encoded as JSON; nothing was sent.
            ValueError: The payload contains NaN or infinity, which JSON does not allow;
                nothing was sent.
            OutboxFull: The outbox is full, usually because the message queue is unreachable;
                nothing was sent.
        """
        guard = self._guards.current()
        if not include_self and not skip_sid:
            skip_sid = flask.request.sid  # type: ignore[attr-defined]
        ack = None
        if callback is not None:
            ack = guard.ack_callback(callback, callback_timeout, on_timeout)
        # An emit() that the application has overridden may not accept these options.
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
        """Emit the event ``message`` or ``json``, like ``SocketIO.send``; see :meth:`emit`."""
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
        """Emit to one client and wait for its acknowledgement; like ``SocketIO.call``.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments.
            to: Session id of the client.
            room: Alias of *to*.
            namespace: Socket.IO namespace; ``None`` means ``"/"``.
            timeout: Longest wait in seconds.
            ignore_queue: Look for the client in this process only.

        Returns:
            The client's answer, decoded from JSON; a tuple if it has several values.

        Raises:
            ConnectionClosed: The client is gone; raised as soon as that is known.
            socketio.exceptions.TimeoutError: No answer within *timeout* seconds.
            ValueError: Neither *to* nor *room* is given; use :meth:`broadcast_call` for rooms.
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
        """Emit to every client in a room, in all processes, and wait for their acknowledgements.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments.
            room: Session id or room.
            timeout: Longest wait in seconds, > 0. The wait ends early when every client has
                answered, provided that the number of processes is known, as with Redis.
            namespace: Socket.IO namespace; ``None`` means ``"/"``.

        Returns:
            The answers by session id, and the clients that did not answer.

        Raises:
            ConfigError: *room* is not a string, or *timeout* is out of range.
            TypeError: The payload cannot be encoded as JSON; nothing was sent.
            ValueError: The payload contains NaN or infinity, which JSON does not allow;
                nothing was sent.
        """
        require_seconds("timeout", timeout)
        if not isinstance(room, str):
            raise ConfigError(f"room must be a string, not {room!r}")
        namespace, arguments = namespace_of(namespace), arguments_of(args)
        guard = self._guards.current()
        guard.listen()
        return guard.broadcast_acks.ask(
            event, arguments, room=room, namespace=namespace, timeout=timeout
        )

    def flush(self, timeout: float) -> bool:
        """Wait until the message queue has acknowledged everything emitted so far.

        Args:
            timeout: Longest wait in seconds, >= 0.

        Returns:
            Whether it has. Always ``True`` without a message queue.
        """
        return self._guards.current().flush(timeout)
