"""Messages in Redis: how those that the store's script returns are read, and what they take."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from ..errors import DeliveryFormatError
from ..states import DeliveryState
from ..telemetry.records import logger
from .records import DEAD, DeadLetter, Delivery

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

# Bytes that Redis 6 needs for a message, beside the texts in it.
_MESSAGE_SIZE: Final = 750
_SIZE_OF_KEY: Final = 100
_SIZE_OF_ALL: Final = 400  # of the set of devices that have acknowledged it


def size_in_redis(delivery: Delivery, text: str, address: str, key: str) -> int:
    """Return about how many bytes of Redis a message takes; rather too many than too few."""
    size = _MESSAGE_SIZE + len(text)  # which is ASCII
    size += 3 * len(address.encode()) + len(delivery.event.encode()) + 2 * len(key)
    return size + _SIZE_OF_KEY * bool(key) + _SIZE_OF_ALL * delivery.requires_all


def read_message(snapshot: Any) -> Delivery:
    """Return a message with its body.

    Args:
        snapshot: Its text, number, attempts, state, the seconds until it expires, and which
            devices have acknowledged it.

    Raises:
        DeliveryFormatError: It is of another version, or was not written by the guard.
    """
    text, number, attempts, state, left, by = snapshot[:6]
    try:
        message = Delivery.from_json(
            text,
            ttl=max(0.0, float(left)),
            number=int(number),
            attempts=int(attempts),
            state=DeliveryState(cast("bytes", state).decode()),
        )
        return message.acknowledged(*_devices(by)) if by else message
    except (ValueError, TypeError) as exc:
        raise DeliveryFormatError("a message in the store cannot be read") from exc


def read_letter(snapshot: Any) -> DeadLetter:
    """Return a dead letter; *snapshot* is as in :func:`read_message`, and when it died."""
    return DeadLetter(read_message([*snapshot[:4], b"0", snapshot[5]]), float(snapshot[6]))


def read_ended(receipt: Any) -> Delivery:
    """Return a message that has ended, with a body only if it is a dead letter.

    Args:
        receipt: Its id, address, event, number, attempts, state, which devices have acknowledged
            it, and its text if it has one.
    """
    id, address, event, number, attempts, state = map(_text, receipt[:6])
    by, *text = receipt[6:]
    known = (id, address, event, int(number), int(attempts), DeliveryState(state))
    ended = Delivery.ended(*known, *(_devices(by) if by else ()))
    if not text:
        return ended
    whole = readable(partial(_with_body, ended), text)
    return whole[0] if whole else ended


def read_all_ended(receipts: Any) -> list[Delivery]:
    """Return the messages that have ended, without those that this version cannot read."""
    return readable(read_ended, receipts)


def read_change(text: bytes) -> tuple[list[str], list[Delivery]] | None:
    """Read one entry of the change feed.

    Returns:
        The addresses for which messages were stored, and the messages that have ended; ``None``
        if it cannot be read, which is logged.
    """
    try:
        stored, ended = json.loads(text)
        deliveries = [read_ended(receipt) for receipt in ended]
        return [address for address in stored if isinstance(address, str)], deliveries
    except (ValueError, TypeError, RecursionError) as exc:
        logger.error(
            "an unreadable entry of the change feed in the delivery store was skipped (%s)",
            type(exc).__name__,
        )
        return None


def with_bodies(ended: list[Delivery], get: Callable[[list[str]], list[Any]]) -> list[Delivery]:
    """Return messages that have ended; those that are dead letters get their bodies.

    Args:
        ended: Without bodies.
        get: Returns the texts of messages by their ids, ``None`` for those that are gone.
    """
    dead = [each.id for each in ended if each.state in DEAD]
    if not dead:
        return ended
    texts = {id: text for id, text in zip(dead, get(dead), strict=True) if text}
    whole = []
    for each in ended:
        found = readable(partial(_with_body, each), [texts[each.id]] if each.id in texts else [])
        whole.append(found[0] if found else each)
    return whole


def readable(read: Callable[[Any], T], records: Iterable[Any]) -> list[T]:
    """Return what *read* makes of *records*, without those that this version did not write."""
    found: list[T] = []
    for record in records:
        try:
            found.append(read(record))
        except (DeliveryFormatError, ValueError, TypeError) as exc:
            logger.error("a record in the delivery store was skipped: %s", exc)
    return found


def _with_body(ended: Delivery, text: str | bytes) -> Delivery:
    whole = Delivery.from_json(
        text, ttl=0.0, number=ended.number, attempts=ended.attempts, state=ended.state
    )
    return whole.acknowledged(ended.acknowledged_by, ended.acknowledgements)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _devices(by: Any) -> tuple[tuple[str, ...], int]:
    """Return the devices that have acknowledged a message, and how many there were."""
    count, *devices = by
    return tuple(map(_text, devices)), int(count)
