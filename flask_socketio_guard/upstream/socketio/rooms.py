"""Rooms of this process's clients, and messages held for clients that are still connecting."""

from __future__ import annotations

from _thread import RLock
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import RoomInvalid
from .recipients import check_room

if TYPE_CHECKING:
    from socketio import Manager as _Manager

    from ...ports import Ports
    from ..engineio.outgoing import ClientMessage
else:
    _Manager = object

OF_ANOTHER = "the room is the session id of another client"


class Held:
    """Messages to send to a client once its connect handler has accepted it.

    Attributes:
        messages: In the order in which they were emitted.
        size: Bytes of all messages together.
    """

    __slots__ = ("messages", "size")

    def __init__(self) -> None:
        self.messages: deque[ClientMessage] = deque()
        self.size = 0


class Rooms(_Manager):
    """The part of a guarded manager that keeps rooms, with an index of each client's rooms.

    Upstream finds the rooms of a client by a search through all rooms of the namespace.
    """

    guard: Ports
    _rooms_of: dict[tuple[str, str], dict[Any, None]]
    _held: dict[str, Held]
    """Messages for clients whose connect handlers have not finished yet, by session id."""

    def index_rooms(self) -> None:
        """Build the index for clients that were connected before the guard was installed."""
        self._held = {}
        self._holding = RLock()  # not gevent's: no holder of it ever blocks
        self._rooms_of = {}
        for namespace, rooms in self.rooms.items():
            for room, clients in rooms.items():
                for sid in clients:
                    self._rooms_of.setdefault((sid, namespace), {})[room] = None

    def check_room(self, room: Any, namespace: str, sid: str | None = None) -> None:
        """Check that *room* may be entered or closed.

        Args:
            room: The room as the application passed it; it may be a client's choice.
            namespace: Socket.IO namespace.
            sid: The client that enters it, whose own session id is allowed.

        Raises:
            RoomInvalid: The room is ``None``, is not hashable, or is another client's session id.
        """
        check_room(room)
        if room != sid and self.is_sid_room(namespace, room):
            raise RoomInvalid(OF_ANOTHER)

    def enter_room(self, sid: str, namespace: str, room: Any, eio_sid: str | None = None) -> None:
        """Add a client to a room; may be called from any thread.

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
        """Remove a client from a room; may be called from any thread.

        Raises:
            RoomInvalid: The room is ``None``, or cannot be the key of a dict.
        """
        check_room(room)
        if self.guard.runtime.on_loop():
            super().leave_room(sid, namespace, room)
        else:
            self.guard.hand_over(partial(self.leave_room, sid, namespace, room))

    def close_room(self, room: Any, namespace: str | None = None) -> None:
        """Remove all clients from a room; may be called from any thread.

        Raises:
            RoomInvalid: As in :meth:`enter_room`.
        """
        self.check_room(room, namespace or "/")
        if self.guard.runtime.on_loop():
            super().close_room(room, namespace)
        else:
            self.guard.hand_over(partial(self.close_room, room, namespace))

    def eio_sid_from_sid(self, sid: str, namespace: str) -> str | None:
        """Return the id of a client's transport, or ``None`` where upstream's may raise."""
        everybody = self.rooms.get(namespace, {}).get(None)
        eio_sid: str | None = None if everybody is None else everybody.get(sid)
        return eio_sid

    def pre_disconnect(self, sid: str, namespace: str) -> str | None:
        """Mark a client as disconnecting, even if the manager's tables have lost it."""
        self.pending_disconnect.setdefault(namespace, []).append(sid)
        return self.eio_sid_from_sid(sid, namespace)

    def basic_enter_room(
        self, sid: str, namespace: str, room: Any, eio_sid: str | None = None
    ) -> None:
        """Add a client to a room, and the room to the index."""
        server: Any = self.server
        if room is None and not server.always_connect:
            # From now on emits reach the client, but it has not been told that it is connected.
            self._held[sid] = Held()
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
        """Remove a client from a room, and the room from the index."""
        super().basic_leave_room(sid, namespace, room)
        rooms = self._rooms_of.get((sid, namespace))
        if rooms is not None:
            rooms.pop(room, None)
            if not rooms:
                del self._rooms_of[sid, namespace]

    def get_rooms(self, sid: str, namespace: str) -> list[Any]:
        """Return the rooms of a client, from the index, without the one that holds all clients."""
        return [room for room in self._rooms_of.get((sid, namespace), ()) if room is not None]

    def basic_disconnect(self, sid: str, namespace: str, **kwargs: Any) -> None:
        """Remove all entries of *sid* and drop its pending callbacks.

        Upstream searches all rooms of the namespace, and each client has one of its own: if a
        thousand clients disconnect at the same time, that takes a million steps.
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
