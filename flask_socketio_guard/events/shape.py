"""The shape of a packet: its number of containers, its depth, and the places of its attachments.

Number and depth are checked before JSON is decoded, with string methods that run in C: a packet of
the largest size may hold a third of a million empty lists, each of which takes twenty times as
much memory as it has characters.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_DEPTH: Final = 100

_MANY: Final = 4096  # values examined before other tasks may run
HEAD: Final = 64
"""Length in characters of the part that contains the opening brackets of every event."""

_LONG: Final = 1024  # characters
_FLATTENINGS: Final = 4
_MARKS: Final = b'"[]{}'
_OTHERS: Final = bytes(each for each in range(256) if each not in _MARKS)
_SQUARE: Final = bytes.maketrans(b"{}", b"[]")
_NAMESPACE: Final = re.compile(r"\d+-?/[^,]*,?")  # after packet type and number of attachments


class TooManyContainers(ValueError):
    """A packet holds more lists and objects than allowed."""


class TooDeep(ValueError):
    """A packet is nested deeper than handlers and encoders support."""


def is_flat(text: str) -> bool:
    """Return whether a packet has no brackets after its head, like one that holds a long string.

    This is ten times as fast as counting the brackets.
    """
    return text.find("[", HEAD) < 0 and text.find("{", HEAD) < 0


def require_shape(text: str, *, max_containers: int) -> None:
    """Check the number and depth of the containers in a packet, which need not be valid JSON.

    For almost all packets it is enough to count the brackets, because they are few. The depth is
    limited because encoding supports less of it than decoding: a handler that forwards what it
    received would fail.

    Args:
        text: A packet, including what precedes its JSON.
        max_containers: Largest number of lists and objects that it may hold.

    Raises:
        TooManyContainers: It holds more than *max_containers*.
        TooDeep: It is nested deeper than :data:`MAX_DEPTH`.
    """
    few = min(MAX_DEPTH, max_containers)
    if len(text) > _LONG and few > HEAD and is_flat(text):
        return
    if text.count("[") + text.count("{") <= few:
        return
    namespace = _NAMESPACE.match(text)
    # The client chooses the namespace. A quote in it would swap the inside and the outside of all
    # strings after it.
    brackets = _brackets_of(text[namespace.end() :] if namespace else text)
    count = brackets.count(b"[")
    if count > max_containers:
        raise TooManyContainers(f"{count} lists and objects, more than {max_containers}")
    if count > MAX_DEPTH and _depth_of(brackets) > MAX_DEPTH:
        raise TooDeep("nested too deep")


def shape_of(text: str) -> tuple[int, int]:
    """Return the number of lists and objects in *text*, and how deep they are nested.

    Args:
        text: A part of a JSON text that consists of whole values.
    """
    brackets = _brackets_of(text)
    return brackets.count(b"["), _depth_of(brackets)


def _brackets_of(text: str) -> bytes:
    """Return the brackets outside strings, with braces replaced by square brackets."""
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    marks = text.encode("utf-8", "surrogatepass").translate(_SQUARE, _OTHERS)
    # Two adjacent quotes are a string without brackets, or the end of one string and the start of
    # the next. Removing them keeps the count even, and so what is inside a string.
    marks = marks.replace(b'""', b"")
    return b"".join(marks.split(b'"')[::2]) if b'"' in marks else marks


def _depth_of(brackets: bytes) -> int:
    """Return how deep *brackets* are nested; the result is arbitrary if they do not match."""
    flattened = 0
    while brackets and flattened < _FLATTENINGS:
        brackets = brackets.replace(b"[]", b"")
        flattened += 1
    depth = deepest = 0
    # Each innermost list that is left held others before, so there are few.
    for run in (b"]" + brackets + b"[").split(b"][")[1:-1]:
        opening = run.count(b"[") + 1
        depth += opening
        deepest = max(deepest, depth)
        depth -= len(run) + 2 - opening
    return flattened + deepest


class Places:
    """The placeholders in a packet, which its binary attachments replace.

    Args:
        data: The decoded JSON of the packet.
        count: Number of attachments that the packet announces.
        take_turn: Called every 4096 values; lets other tasks run when the time slice is used up.

    Raises:
        ValueError: An attachment does not have exactly one placeholder.

    Source:
        Socket.IO protocol v5, BINARY_EVENT: attachments are replaced by placeholders, numbered
        from 0. Upstream allows any number of placeholders for one attachment, which can turn a
        megabyte into gigabytes as soon as a handler forwards the event.
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
        """Record which of *members* are placeholders, and append the containers to *below*."""
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
        """Replace the placeholders by *attachments*, in order, and return the data."""
        for place, attachment in zip(self._places, attachments, strict=True):
            assert place is not None
            parent, key = place
            parent[key] = attachment
        return self._root[0]
