"""The record of one emit, passed to the clients of this process and to other processes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

from ...clients.send_queue import SendOutcome

if TYPE_CHECKING:
    from collections.abc import Callable


class Emission(NamedTuple):
    """An event to emit, its recipients, and its options.

    Attributes:
        event: Name of the event.
        data: The data as the application passed it; a tuple stands for several arguments.
        namespace: Socket.IO namespace.
        room: A room or session id, a collection of these, or ``None`` for all clients.
        skip_sid: A session id, or a collection of them, that does not receive the event.
        callback: Called with the acknowledgement of each client.
        is_volatile: Whether it may be dropped for a slow client.
        is_ready_only: Whether it goes only to clients that have finished their handshake.
    """

    event: str
    data: Any
    namespace: str
    room: Any
    skip_sid: Any = None
    callback: Callable[..., object] | None = None
    is_volatile: bool = False
    is_ready_only: bool = False

    @property
    def body(self) -> list[Any]:
        """The body of an EVENT packet: a list of the event's name and its arguments."""
        data = self.data
        if isinstance(data, tuple):
            return [self.event, *data]
        return [self.event] if data is None else [self.event, data]

    def snapshot(self) -> Emission:
        """Return a copy that does not change with the application's objects before it is sent."""
        return self._replace(
            data=_snapshot(self.data),
            room=_kept(self.room),
            skip_sid=_kept(self.skip_sid),
        )


def best_of(outcomes: list[SendOutcome]) -> SendOutcome:
    """Return the best of several recipients' outcomes: queued, then slow, then closed."""
    for outcome in (SendOutcome.QUEUED, SendOutcome.DROPPED_SLOW):
        if outcome in outcomes:
            return outcome
    return SendOutcome.DROPPED_CLOSED


def is_several(room: Any) -> bool:
    """Return whether *room* is a collection of rooms, by the same test as upstream's."""
    return not isinstance(room, str) and room is not None and hasattr(room, "__len__")


def as_returned(room: Any) -> Any:
    """Return *room* as it looks after a round trip through JSON, which has no tuples."""
    return list(room) if isinstance(room, tuple) else room


def _kept(room: Any) -> Any:
    return copy.copy(room) if is_several(room) else room


def _snapshot(data: Any) -> Any:
    try:
        return copy.deepcopy(data)
    except Exception:  # noqa: BLE001 - with its own JSON module, an application may emit any object
        return data
