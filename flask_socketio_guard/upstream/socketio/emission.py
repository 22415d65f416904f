"""One emit, on its way to the clients of this process and to other processes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

from ...clients.send_queue import SendOutcome

if TYPE_CHECKING:
    from collections.abc import Callable


class Emission(NamedTuple):
    """What is emitted, to whom, and how.

    Attributes:
        event: Its name.
        data: As the application gave it: a tuple is several arguments.
        namespace: Socket.IO namespace.
        room: A room or session id, a collection of these, or ``None`` for everybody.
        skip_sid: Those who do not get it.
        callback: Called with the answer of each client.
        is_volatile: Whether it may be dropped for a client that is slow.
        is_ready_only: Whether only those get it that have finished their handshake.
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
        """The body of an EVENT packet."""
        data = self.data
        if isinstance(data, tuple):
            return [self.event, *data]
        return [self.event] if data is None else [self.event, data]

    def as_it_is(self) -> Emission:
        """Return it such that no change of what it holds shows: it is sent later."""
        return self._replace(
            data=_snapshot(self.data),
            room=_kept(self.room),
            skip_sid=_kept(self.skip_sid),
        )


def best_of(outcomes: list[SendOutcome]) -> SendOutcome:
    """Return what became of a message for whom it went best."""
    for outcome in (SendOutcome.QUEUED, SendOutcome.DROPPED_SLOW):
        if outcome in outcomes:
            return outcome
    return SendOutcome.DROPPED_CLOSED


def is_several(room: Any) -> bool:
    """Say whether *room* is a collection of rooms; as upstream does."""
    return not isinstance(room, str) and room is not None and hasattr(room, "__len__")


def as_returned(room: Any) -> Any:
    """Return *room* as it comes back from another process: JSON knows no tuples."""
    return list(room) if isinstance(room, tuple) else room


def _kept(room: Any) -> Any:
    return copy.copy(room) if is_several(room) else room


def _snapshot(data: Any) -> Any:
    try:
        return copy.deepcopy(data)
    except Exception:  # noqa: BLE001 - an application's JSON may hold anything
        return data
