"""The shape of a packet: how many containers, how deep, and where its attachments go.

All of it is looked up at the speed of C, before JSON is decoded: a packet of the largest size may
hold a third of a million empty lists, each of which costs twenty times as much as it is long.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_DEPTH: Final = 100

_MANY: Final = 4096  # values that are looked at in one go
HEAD: Final = 64
"""Characters in which an event has the brackets that all events have."""

_LONG: Final = 1024  # characters
_FLATTENINGS: Final = 4
_MARKS: Final = b'"[]{}'
_OTHERS: Final = bytes(each for each in range(256) if each not in _MARKS)
_SQUARE: Final = bytes.maketrans(b"{}", b"[]")
_NAMESPACE: Final = re.compile(r"\d+-?/[^,]*,?")  # behind the type and the number of attachments


class TooManyContainers(ValueError):
    """A packet holds more lists and objects than it may."""


class TooDeep(ValueError):
    """A packet is nested deeper than handlers and encoders bear."""


def is_flat(text: str) -> bool:
    """Say whether a packet has no brackets behind its head, as one that is a long text has none.

    To find that out is ten times as fast as to count them.
    """
    return text.find("[", HEAD) < 0 and text.find("{", HEAD) < 0


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
    if len(text) > _LONG and few > HEAD and is_flat(text):
        return
    if text.count("[") + text.count("{") <= few:
        return
    namespace = _NAMESPACE.match(text)
    # A client names it as it likes: a quote in there would turn the strings behind it inside out.
    brackets = _brackets_of(text[namespace.end() :] if namespace else text)
    count = brackets.count(b"[")
    if count > max_containers:
        raise TooManyContainers(f"{count} lists and objects, more than {max_containers}")
    if count > MAX_DEPTH and _depth_of(brackets) > MAX_DEPTH:
        raise TooDeep("nested too deep")


def shape_of(text: str) -> tuple[int, int]:
    """Return how many lists and objects a part of JSON holds, and how deep they are nested.

    Args:
        text: Whole values.
    """
    brackets = _brackets_of(text)
    return brackets.count(b"["), _depth_of(brackets)


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
        take_turn: Called now and then; lets others have their turn when it is time.

    Raises:
        ValueError: Not each of them goes to one place.

    Source:
        Socket.IO protocol v5, BINARY_EVENT: attachments are replaced by placeholders, which number
        them from 0 on. Upstream lets one attachment have any number of places, and so a megabyte
        may become gigabytes as soon as it is sent on.
    """

    __slots__ = ("_places", "_root")

    def __init__(
        self, data: Any, count: int, *, take_turn: Callable[[], object] = lambda: None
    ) -> None:
        self._root = [data]
        self._places: list[tuple[Any, Any] | None] = [None] * count
        level: list[Any] = [self._root]
        looked = 0
        while level:
            below: list[Any] = []
            for parent in level:
                members = parent.items() if type(parent) is dict else enumerate(parent)
                looked += len(parent)
                if looked <= _MANY:
                    self._look_at(parent, members, below)
                    continue
                looked = 0
                rest = iter(members)
                for _ in range(0, len(parent) or 1, _MANY):
                    take_turn()
                    self._look_at(parent, islice(rest, _MANY), below)
            level = below
        if None in self._places:
            raise ValueError(f"attachment {self._places.index(None)} has no place")

    def _look_at(self, parent: Any, members: Iterable[tuple[Any, Any]], below: list[Any]) -> None:
        """Note which of *members* are attachments, and add the containers to *below*."""
        for key, value in members:
            kind = type(value)
            if kind is list:
                below.append(value)
            elif kind is dict:
                if value.get("_placeholder") and "num" in value:
                    self._take(value["num"], parent, key)
                else:
                    below.append(value)

    def _take(self, number: Any, parent: Any, key: Any) -> None:
        if type(number) is not int or not 0 <= number < len(self._places):
            raise ValueError("a placeholder has no number of an attachment")
        if self._places[number] is not None:
            raise ValueError(f"attachment {number} has two places")
        self._places[number] = (parent, key)

    def fill(self, attachments: list[Any]) -> Any:
        """Return the data with all of its attachments, each where it belongs."""
        for place, attachment in zip(self._places, attachments, strict=True):
            assert place is not None
            parent, key = place
            parent[key] = attachment
        return self._root[0]
