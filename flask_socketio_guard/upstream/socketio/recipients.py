"""Recipients of an event: only ``None`` means all clients.

Upstream evaluates ``to or room`` for each recipient, so an empty list of rooms, an empty string
or a zero becomes a broadcast. A list that happens to be empty would send an event to all clients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...errors import RoomInvalid


class Exactly(NamedTuple):
    """Wraps a falsy recipient so that it passes upstream's ``to or room``."""

    recipient: Any


def recipient_of(to: Any, room: Any) -> Any:
    """Return the recipient given by two synonymous keywords: the first that is not ``None``."""
    if to is None:
        to = room
    return to.recipient if type(to) is Exactly else to


def marked(options: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of an ``emit`` with a falsy recipient wrapped in :class:`Exactly`."""
    to = options.get("to")
    if to is None:
        to = options.get("room")
    if to or to is None:
        return options
    return {**options, "to": Exactly(to)}


def is_empty_collection(room: Any) -> bool:
    """Return whether *room* is an empty list of rooms or another empty collection."""
    return not room and room is not None and not isinstance(room, str) and hasattr(room, "__len__")


def check_room(room: Any) -> None:
    """Check that *room* can be the name of a room.

    Raises:
        RoomInvalid: *room* is not hashable, or is ``None``, the room in which upstream keeps all
            clients: a client that leaves it receives nothing any more, and closing it does that
            to all clients of the fleet.
    """
    if room is None:
        raise RoomInvalid("None means all clients and is not a room")
    try:
        hash(room)
    except TypeError:
        raise RoomInvalid(f"a {type(room).__name__} cannot be a room") from None
