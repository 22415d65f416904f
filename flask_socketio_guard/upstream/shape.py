"""The shape of a packet: how many containers, how deep, and where its attachments go.

All of it is looked up at the speed of C, before JSON is decoded: a packet of the largest size may
hold a third of a million empty lists, each of which costs twenty times as much as it is long.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, Final

MAX_DEPTH: Final = 100

_HEAD: Final = 64  # characters in which an event has the brackets that all events have
_FLATTENINGS: Final = 4
_MARKS: Final = b'"[]{}'
_OTHERS: Final = bytes(each for each in range(256) if each not in _MARKS)
_SQUARE: Final = bytes.maketrans(b"{}", b"[]")


class TooManyContainers(ValueError):
    """A packet holds more lists and objects than it may."""


class TooDeep(ValueError):
    """A packet is nested deeper than handlers and encoders bear."""


def require_shape(text: str, *, max_containers: int) -> None:
    """Make sure that JSON *text* is worth decoding, whether it is JSON or not.

    Almost every packet has few brackets, and those are all that is counted of it. Decoding stands
    more depth than encoding: a handler that sends on what it got would fail.

    Args:
        text: A packet, with whatever is in front of its JSON.
        max_containers: Lists and objects that it may hold.

    Raises:
        TooManyContainers: It holds more.
        TooDeep: It is nested deeper than :data:`MAX_DEPTH`.
    """
    few = min(MAX_DEPTH, max_containers)
    if text.find("[", _HEAD) < 0 and text.find("{", _HEAD) < 0 and few > _HEAD:
        return  # found out ten times as fast as by counting
    if text.count("[") + text.count("{") <= few:
        return
    brackets = _brackets_of(text)
    count = brackets.count(b"[")
    if count > max_containers:
        raise TooManyContainers(f"{count} lists and objects, more than {max_containers}")
    if count > MAX_DEPTH and _depth_of(brackets) > MAX_DEPTH:
        raise TooDeep("nested too deep")


def _brackets_of(text: str) -> bytes:
    """Return the brackets outside of strings, all of them square."""
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    marks = text.encode("utf-8", "surrogatepass").translate(_SQUARE, _OTHERS)
    # What is left of strings without brackets: an even count of quotes, whichever these are.
    marks = marks.replace(b'""', b"")
    return b"".join(marks.split(b'"')[::2]) if b'"' in marks else marks


def _depth_of(brackets: bytes) -> int:
    """Return how deep *brackets* are nested; anything, if they do not match."""
    flattened = 0
    while brackets and flattened < _FLATTENINGS:
        brackets = brackets.replace(b"[]", b"")
        flattened += 1
    depth = deepest = 0
    # Each innermost list that is left had others in it, and so there are not many.
    for run in (b"]" + brackets + b"[").split(b"][")[1:-1]:
        opening = run.count(b"[") + 1
        depth += opening
        deepest = max(deepest, depth)
        depth -= len(run) + 2 - opening
    return flattened + deepest


class Places:
    """Where the attachments of a packet go.

    Args:
        data: Its decoded JSON.
        count: Attachments that it announces.

    Raises:
        ValueError: Not each of them goes to one place.

    Source:
        Socket.IO protocol v5, BINARY_EVENT: attachments are replaced by placeholders, which number
        them from 0 on. Upstream lets one attachment have any number of places, and so a megabyte
        may become gigabytes as soon as it is sent on.
    """

    __slots__ = ("_places", "_root")

    def __init__(self, data: Any, count: int) -> None:
        self._root = [data]
        self._places: list[tuple[Any, Any] | None] = [None] * count
        lists: list[Any] = [self._root]
        dicts: list[Any] = []
        while lists or dicts:
            values = [*chain.from_iterable(lists), *chain.from_iterable(map(dict.values, dicts))]
            below = [value for value in values if type(value) is dict]
            placeholders = [each for each in below if each.get("_placeholder") and "num" in each]
            if placeholders:
                self._take(placeholders, lists, dicts)
                below = [each for each in below if not (each.get("_placeholder") and "num" in each)]
            lists = [value for value in values if type(value) is list]
            dicts = below
        if None in self._places:
            raise ValueError(f"attachment {self._places.index(None)} has no place")

    def _take(self, placeholders: list[Any], lists: list[Any], dicts: list[Any]) -> None:
        wanted = {}
        numbers = set()
        for placeholder in placeholders:
            number = placeholder["num"]
            if type(number) is not int or not 0 <= number < len(self._places):
                raise ValueError("a placeholder has no number of an attachment")
            if number in numbers or self._places[number] is not None:
                raise ValueError(f"attachment {number} has two places")
            numbers.add(number)
            wanted[id(placeholder)] = number
        for parents, items_of in ((lists, enumerate), (dicts, dict.items)):
            for parent in parents:
                for key, value in items_of(parent):
                    if id(value) in wanted:
                        self._places[wanted[id(value)]] = (parent, key)

    def fill(self, attachments: list[Any]) -> Any:
        """Return the data with all of its attachments, each where it belongs."""
        for place, attachment in zip(self._places, attachments, strict=True):
            assert place is not None
            parent, key = place
            parent[key] = attachment
        return self._root[0]
