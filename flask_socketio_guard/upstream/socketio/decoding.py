"""Packets from clients: decoded, checked, and reassembled from their attachments."""

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
_MAX_ATTACHMENT_MESSAGES = 8  # for all attachments of a packet, in messages of the largest size
_CONNECT = packets.Packet(encoded_packet="0")  # to "/" and without data, as most are

RESERVED_EVENTS = frozenset({"connect", "disconnect", "*"})
"""Event names that clients must not send, because only the server calls their handlers.

``"*"`` is reserved because a catch-all handler would take the first argument of a literal
``"*"`` event for the session id, so a client could impersonate any other.
"""


def nothing() -> None:
    """Do nothing; the default where a callback is optional."""


def decode(
    packet_class: Any, data: Any, *, max_containers: int, pause: Callable[[], object] = nothing
) -> Any:
    """Return the packet in *data*, still without its attachments.

    Args:
        packet_class: The packet class of the server.
        data: The message from the client.
        max_containers: Most lists and objects that the packet may hold.
        pause: Called regularly to yield control while a large packet is decoded.

    Raises:
        ProtocolViolation: *data* is not a valid packet, or exceeds a limit.
    """
    if not data:
        raise ProtocolViolation("packet", "empty")
    if data == "0" and packet_class.decode is packets.Packet.decode:
        return _CONNECT
    if packet_class.uses_binary_events and not isinstance(data, str):
        raise ProtocolViolation("attachments", "none was announced")
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

    Args:
        packet: The packet, as :func:`decode` returned it.
        data: The next message from the client.
        max_size: Largest size of one message, in bytes; the attachments of a packet together
            may have eight times as many.

    Returns:
        Whether the packet is now complete.

    Raises:
        ProtocolViolation: *data* is not an attachment, does not fit, or is too large.

    Source:
        Socket.IO protocol v5, "Packet encoding": a packet with attachments is
        followed by exactly that many binary messages.
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
    """Return whether the class reassembles packets with upstream's methods, not overridden ones."""
    return all(
        getattr(getattr(packet_class, name), "__func__", getattr(packet_class, name))
        is getattr(getattr(packets.Packet, name), "__func__", getattr(packets.Packet, name))
        for name in ("add_attachment", "reconstruct_binary", "_reconstruct_binary_internal")
    )


def name_of(data: object) -> object:
    """Return the event's name from the body of an EVENT packet, or a malformed body itself."""
    return data[0] if isinstance(data, list) and data else data


def invalid_event(data: object) -> EventInvalid | None:
    """Return what is wrong with *data*, the decoded body of an EVENT packet.

    Returns:
        ``None`` if it is a list that begins with a name that is not reserved.

    Source:
        Socket.IO protocol v5, EVENT: a non-empty array whose first item is the event's name.
    """
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        return EventInvalid("an event must be a list that begins with its name")
    if data[0] in RESERVED_EVENTS:
        return EventInvalid("this event name is reserved", code="reserved_event")
    return None
