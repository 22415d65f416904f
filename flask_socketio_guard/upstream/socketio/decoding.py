"""What a client sends, as a packet: decoded, looked through, and put together."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from socketio import packet as packets

from ...errors import EventInvalid
from ...events.pieces import TimeSlice
from ...events.shape import Places, TooDeep, TooManyContainers, require_shape
from ..engineio.violations import ProtocolViolation, TooLarge
from .encoding import IN_PIECES, KeptJSON, decoding_in_pieces, is_quick

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

_BINARY = frozenset({packets.BINARY_EVENT, packets.BINARY_ACK})
_MAX_ATTACHMENTS = 64
_MAX_ATTACHMENT_MESSAGES = 8  # the attachments of one packet, in messages of the largest size
_CONNECT = packets.Packet(encoded_packet="0")  # to "/" and with no more to say; most are

RESERVED_EVENTS = frozenset({"connect", "disconnect", "*"})
"""Names that are no events of a client: handlers of these are for the server to call.

``"*"`` is here because a catch-all handler takes the first argument of a literal
``"*"`` event for the session id, and so a client could act as any other.
"""


def nothing() -> None:
    """Do nothing."""


def decode(
    packet_class: Any, data: Any, *, max_containers: int, pause: Callable[[], object] = nothing
) -> Any:
    """Return a packet, without its attachments.

    Args:
        packet_class: That of the server.
        data: What the client sent.
        max_containers: Lists and objects that it may hold.
        pause: Lets others have their turn, while a large one is decoded.

    Raises:
        ProtocolViolation: *data* is none.
    """
    if not data:
        raise ProtocolViolation("packet", "empty")
    if data == "0" and packet_class.decode is packets.Packet.decode:
        return _CONNECT
    if packet_class.uses_binary_events and not isinstance(data, str):
        raise ProtocolViolation("attachments", "nobody announced one")
    is_large = len(data) >= IN_PIECES and not is_quick(data)
    take_turn = TimeSlice(pause).check if is_large else nothing
    try:
        if is_large and packet_class.json is KeptJSON:
            with decoding_in_pieces(max_containers=max_containers, take_turn=take_turn):
                packet = packet_class(encoded_packet=data)
        else:
            if isinstance(data, str):
                require_shape(data, max_containers=max_containers)
            packet = packet_class(encoded_packet=data)
    except TooManyContainers as exc:
        raise TooLarge("size", str(exc)) from exc
    except TooDeep as exc:
        raise ProtocolViolation("packet", str(exc)) from exc
    except Exception as exc:
        raise ProtocolViolation("packet", f"not a Socket.IO packet: {exc}") from exc
    count = packet.attachment_count
    if count:
        if count > _MAX_ATTACHMENTS or packet.packet_type not in _BINARY:
            raise ProtocolViolation("attachments", f"{count} announced")
        try:
            packet.places = Places(packet.data, count, take_turn=take_turn)
        except ValueError as exc:
            raise ProtocolViolation("attachments", str(exc)) from exc
    return packet


def attach(packet: Any, data: Any, *, max_size: int) -> bool:
    """Add an attachment to a packet.

    Returns:
        Whether it was the last.

    Raises:
        ProtocolViolation: *data* is none, does not fit, or is too large.

    Source:
        Socket.IO protocol v5, "Packet encoding": a packet with attachments is
        followed by just as many binary messages.
    """
    if not isinstance(data, (bytes, bytearray)):
        raise ProtocolViolation("attachments", "text instead of an attachment")
    size = len(data) + sum(map(len, packet.attachments))
    if size > _MAX_ATTACHMENT_MESSAGES * max_size:
        raise ProtocolViolation("attachments", "too large together")
    if not _is_put_together_here(packet.__class__):
        try:
            return bool(packet.add_attachment(data))
        except Exception as exc:
            raise ProtocolViolation("attachments", f"do not fit: {exc}") from exc
    packet.attachments.append(data)
    if len(packet.attachments) < packet.attachment_count:
        return False
    packet.data = packet.places.fill(packet.attachments)
    return True


@lru_cache(maxsize=16)
def _is_put_together_here(packet_class: Hashable) -> bool:
    """Say whether the application leaves it to upstream to put packets together."""
    return all(
        getattr(getattr(packet_class, name), "__func__", getattr(packet_class, name))
        is getattr(getattr(packets.Packet, name), "__func__", getattr(packets.Packet, name))
        for name in ("add_attachment", "reconstruct_binary", "_reconstruct_binary_internal")
    )


def name_of(data: object) -> object:
    """Return the name of an event, or what there is instead."""
    return data[0] if isinstance(data, list) and data else data


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
