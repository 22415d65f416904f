"""The guarded side of ``socketio.PubSubManager``: a process among others."""

from __future__ import annotations

import base64
import logging
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from ...clients.send_queue import SendOutcome
from ...errors import EventInvalid, RoomInvalid
from ...events.acknowledgements import (
    BROADCAST_ANSWER,
    BROADCAST_CALL,
    BROADCAST_PARTICIPANTS,
    AckCallback,
)
from ...events.shape import Places
from ...queue.transport import SEQUENCE_KEY, SEQUENCE_MARK
from ...telemetry.records import Repetition
from ..engineio.session_ids import is_session_id
from ..engineio.watched_socket import is_logged
from .emission import Emission, as_returned, is_several
from .encoding import KeptPacket, encoded_for_queue, without_attachments
from .managers import GuardedManager
from .recipients import check_room
from .rooms import OF_ANOTHER

if TYPE_CHECKING:
    from collections.abc import Callable

    from socketio import PubSubManager as _PubSubManager

    from ...ports import Ports
    from ...queue.duplicates import Duplicates
    from ...queue.transport import Arrival
else:
    _PubSubManager = object

_CALLBACK_GONE = "guard_callback_gone"
"""Method of a message that says: the client you wait for has left.

Peers without the guard ignore messages whose method they do not know.
"""

_SENT_TO_CLIENTS = frozenset({"emit", BROADCAST_CALL})
_ROOM_CHANGES = frozenset({"enter_room", "leave_room", "close_room"})
_VOLATILE = "guard_volatile"
_READY_ONLY = "guard_ready_only"

_MAX_NAME = 100  # characters of what another process is called that are told on
_LONGEST_TAIL = 24  # bytes: a sequence number, and the end of the message


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

    def _hand_over(self, emission: Emission) -> SendOutcome:
        """Have *emission*, of another thread, sent to all processes by the event loop."""
        message = self._message(emission)
        encoded_for_queue(self.json, self.server.packet_class, message)
        self.guard.hand_over(partial(self.emit_everywhere, emission, message))
        return SendOutcome.HANDED_TO_QUEUE

    def _message(self, emission: Emission) -> dict[str, Any]:
        """Return what the other processes are told."""
        data = emission.data
        items = list(data) if isinstance(data, tuple) else [data]
        is_binary = KeptPacket.data_is_binary(items)
        if is_binary:
            items, attachments = without_attachments(items)
            items = [items, *[base64.b64encode(part).decode() for part in attachments]]
        message = {
            "method": "emit",
            "event": emission.event,
            "data": items,
            "binary": is_binary,
            "namespace": emission.namespace,
            "room": emission.room,
            "skip_sid": emission.skip_sid,
            "callback": None,
        }
        if emission.is_volatile:
            message[_VOLATILE] = True
        if emission.is_ready_only:
            message[_READY_ONLY] = True
        message["host_id"] = self.host_id
        return message

    def emit_everywhere(
        self, emission: Emission, message: dict[str, Any] | None = None, *, may_wait: bool = False
    ) -> SendOutcome:
        """Tell the other processes of *emission*, and queue it for clients of this one.

        Args:
            emission: What is emitted.
            message: What they are told, if that is made already.
            may_wait: Whether to wait for room at a client, see :meth:`.GuardedSocket.put`.
        """
        message = self._message(emission) if message is None else message
        if emission.callback is None:
            self._publish(message)
        else:
            self._publish_with_callback(message, emission.callback)
            relay = partial(self._return_callback, self.host_id, *message["callback"])
            emission = emission._replace(callback=relay)
        if self.has_own_delivery:
            self._handle_emit(message)
            return SendOutcome.HANDED_TO_QUEUE
        outcome = self.emit_here(emission, may_wait=may_wait)
        room = emission.room
        is_here = isinstance(room, str) and room in self.guard.connections
        return outcome if is_here else SendOutcome.HANDED_TO_QUEUE

    def _has_anyone_in(self, namespace: Any, room: Any) -> bool:
        if self.has_own_participants:
            return any(self.get_participants(namespace, room))
        rooms = self.rooms.get(namespace)
        if not rooms:
            return False
        return any(name in rooms for name in room) if is_several(room) else room in rooms

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
            self.emit_here(
                Emission(
                    message["event"],
                    data,
                    message["namespace"],
                    room,
                    message.get("skip_sid"),
                    callback,
                    _VOLATILE in message,
                    _READY_ONLY in message,
                )
            )
        except ValueError as exc:
            # A process without the guard has sent what no browser bears: a NaN, or a placeholder
            # of a client's.
            error = EventInvalid(f"the clients cannot be sent it: {exc}")
            self.guard.handlers.reject(message["event"], message["namespace"], None, error)

    def _publish_with_callback(
        self, message: dict[str, Any], callback: Callable[..., object]
    ) -> None:
        room = message["room"]
        if room is None:
            raise ValueError("Cannot use callback without a room set.")
        self.guard.listen()
        ack_id = self._generate_ack_id(room, callback)
        message["callback"] = (room, message["namespace"], ack_id)
        try:
            self._publish(message)
        except BaseException:
            self.guard.callbacks.discard(ack_id, as_returned(room))
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
            raise RoomInvalid(OF_ANOTHER)

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
        self.guard.telemetry.send(Repetition(host_id[:_MAX_NAME], sequence))
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
