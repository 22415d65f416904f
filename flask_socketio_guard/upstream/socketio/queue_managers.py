"""The guarded side of ``socketio.PubSubManager``: one process of a fleet."""

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
"""Method of a message that reports: the client whose answer you wait for has disconnected.

Processes without the guard ignore messages with an unknown method.
"""

_SENT_TO_CLIENTS = frozenset({"emit", BROADCAST_CALL})
_ROOM_CHANGES = frozenset({"enter_room", "leave_room", "close_room"})
_VOLATILE = "guard_volatile"
_READY_ONLY = "guard_ready_only"

_MAX_NAME = 100  # characters of another process's host id in telemetry
_LONGEST_TAIL = 24  # bytes: a sequence number and the end of the message


class GuardedPubSubManager(GuardedManager, _PubSubManager):
    """Mixed in before ``PubSubManager``; sends through the outbox, receives from the listener."""

    is_logged = False
    """Whether upstream's log line for each message would be emitted."""
    _duplicates: Duplicates

    def initialize(self) -> None:
        """Start the guard, if nothing has started it before the first client."""
        super().initialize()
        if not self.write_only:
            self._get_logger().info(f"{self.name} backend initialized.")

    def check_observers(self) -> None:
        """Check whether a logger accepts upstream's line for each message; called regularly."""
        self.is_logged = is_logged(self._get_logger(), logging.DEBUG)

    def _hand_over(self, emission: Emission) -> SendOutcome:
        """Encode *emission* to check it, then emit it on the event loop's own thread."""
        message = self._message(emission)
        encoded_for_queue(self.json, self.server.packet_class, message)
        self.guard.hand_over(partial(self.emit_everywhere, emission, message))
        return SendOutcome.HANDED_TO_QUEUE

    def _message(self, emission: Emission) -> dict[str, Any]:
        """Return the message for the other processes, as upstream's with two more keys."""
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
        """Publish *emission* to the other processes, and queue it for clients of this one.

        Args:
            emission: The event to emit.
            message: The message for the other processes, if it has been built already.
            may_wait: Whether to wait for room in a client's queue, see
                :meth:`.GuardedSocket.put`.
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
        # A packet without a recipient here need not be built.
        room = message.get("room")
        remote = message.get("callback")
        if not self._has_anyone_in(message["namespace"], room):
            if remote is not None and isinstance(room, str) and self.guard.has_departed(room):
                # The process that asked need not wait for its timeout.
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
            # A process without the guard has sent something that breaks browsers: a NaN, or a
            # placeholder that came from a client.
            error = EventInvalid(f"it cannot be sent to clients: {exc}")
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
        """Publish *message* to all other processes; ``host_id`` must be its last key."""
        self._publish(message)

    def _generate_ack_id(self, sid: Any, callback: Callable[..., object]) -> int:
        if isinstance(callback, partial) and callback.func == self._return_callback:
            callback = self._relay(sid, callback)
        return super()._generate_ack_id(sid, callback)

    def _relay(self, sid: str, callback: partial[None]) -> AckCallback:
        """Return a callback that sends the answer of *sid* back to the process that asked."""
        host_id, room, _, ack_id = callback.args

        def lost(reason: str) -> None:
            # In a room, other clients may still answer; a session id has only one client.
            if reason != "gone" or room != sid:
                return
            if host_id == self.host_id:
                self.guard.callbacks.lose(ack_id, room, reason)
            else:
                self._publish(_gone(host_id, room, ack_id))

        def answered(*arguments: Any) -> None:
            callback(*arguments)

        # Both run in the task that reads the client's packets or handles its disconnect. A full
        # outbox, or an answer that JSON cannot represent, must not end that task.
        recording = self.guard.handlers.recording
        return AckCallback(recording(answered), on_lost=recording(lost), is_inline=True)

    def deliver(self, arrival: Arrival) -> None:
        """Handle one message from another process.

        Called by the listener, so application code is not called here but in separate tasks.

        Args:
            arrival: JSON text or a dict. It is not trusted: anything that can write to the
                channel may have sent it.
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
            error = EventInvalid("not a Socket.IO message")
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
        """Return, without decoding *payload*, whether this process published it.

        Upstream puts the host id last, and the guard appends the sequence number to it. A
        message in another format is decoded, and its host id checked then.
        """
        mark = _own_mark(self.host_id)
        return payload.find(mark, -len(mark) - _LONGEST_TAIL) >= 0

    def check_room(self, room: Any, namespace: str, sid: str | None = None) -> None:
        """Check *room* as for one process, and that it is no session id of another process."""
        super().check_room(room, namespace, sid)
        if room == sid or not is_session_id(room):
            return
        # The session id of a former client of this process may remain in use as a room's name.
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
        """Check the room of a change from another process, which may run another version."""
        room, sid, namespace = message.get("room"), message.get("sid"), message.get("namespace")
        check_room(room)
        if not isinstance(namespace, str):
            raise EventInvalid("not a Socket.IO message")
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
        """Return whether a message was received before; see :mod:`~...queue.duplicates`."""
        sequence = message.get(SEQUENCE_KEY)
        if not isinstance(sequence, int) or not isinstance(host_id, str):
            return False
        content = hash(arrival if isinstance(arrival, bytes | str) else repr(arrival))
        if not self._duplicates.has_seen(host_id, sequence, content):
            return False
        self.guard.telemetry.send(Repetition(host_id[:_MAX_NAME], sequence))
        return True


class ThroughOutbox(_PubSubManager):
    """Puts messages to other processes into the outbox instead of sending them to the broker."""

    guard: Ports

    def _publish(self, data: dict[str, Any]) -> None:
        if data["method"] in _SENT_TO_CLIENTS:
            payload: Any = encoded_for_queue(self.json, self.server.packet_class, data)
        else:
            payload = self.json.dumps(data)
        self.guard.publish(payload if isinstance(payload, bytes) else payload.encode())


class QueuedRedisManager(GuardedPubSubManager, ThroughOutbox):
    """Mixed in before ``RedisManager``; the guard has its own connections to Redis."""


@lru_cache(maxsize=16)
def _own_mark(host_id: str) -> bytes:
    """Return the bytes between the body of a message from *host_id* and its sequence number."""
    return b'"host_id": "%s"%s' % (host_id.encode(), SEQUENCE_MARK)


def _gone(host_id: object, sid: str, ack_id: object) -> dict[str, Any]:
    """Return a message that tells the process *host_id* that *sid* will not answer.

    Its host id must not be the last key, because that position identifies the sender.
    """
    return {"method": _CALLBACK_GONE, "host_id": host_id, "sid": sid, "id": ack_id}
