"""Who gets an event: only ``None`` is everybody.

Upstream writes ``to or room`` wherever a recipient is taken, so that an empty list of rooms, an
empty text or a zero is a broadcast: a list that happens to be empty today tells everybody.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...errors import RoomInvalid


class Exactly(NamedTuple):
    """A recipient that upstream would take for none, on its way through upstream's ``or``."""

    recipient: Any


def recipient_of(to: Any, room: Any) -> Any:
    """Return who is meant by two keywords for the same: the first that is not ``None``."""
    if to is None:
        to = room
    return to.recipient if type(to) is Exactly else to


def marked(options: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of an ``emit`` such that upstream hands on any recipient."""
    to = options.get("to")
    if to is None:
        to = options.get("room")
    if to or to is None:
        return options
    return {**options, "to": Exactly(to)}


def is_nobody(room: Any) -> bool:
    """Say whether *room* is a list of rooms, or another collection, that is empty."""
    return not room and room is not None and not isinstance(room, str) and hasattr(room, "__len__")


def check_room(room: Any) -> None:
    """Make sure that *room* can be the name of a room.

    Raises:
        RoomInvalid: It is ``None``, in which upstream keeps everybody: a client that leaves it gets
            nothing any more, and closing it does so to all clients of the fleet. Or it is not
            hashable.
    """
    if room is None:
        raise RoomInvalid("None means everybody and is not a room")
    try:
        hash(room)
    except TypeError:
        raise RoomInvalid(f"a {type(room).__name__} cannot be a room") from None
