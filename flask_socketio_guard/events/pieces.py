"""Incremental JSON decoding, which lets other tasks run between two pieces of a large text.

A decoder in C blocks the event loop until it has finished, and needs 40 to 60 ms for a megabyte of
numbers or of keys. Here it decodes one piece of the text at a time, which holds some whole values
of one list or some members of one object, and the results are joined.
"""

from __future__ import annotations

import gc
import re
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from ..core.runtime import TIME_SLICE, clock
from .shape import MAX_DEPTH, TooDeep, TooManyContainers, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.runtime import Flag, Runtime

    Scan = Callable[[str, int], tuple[Any, int]]

_PATIENCE: Final = 1.0  # seconds; in case the task that moves the line was killed
_FIRST: Final = 512  # characters of the first piece of a container
_MOST: Final = 32 * 1024  # characters of one piece; it takes 0.3 to 2 ms, depending on content
_LOOKS: Final = 4  # separators tried before a cut is made without balanced brackets
_FEWER: Final = 8 * 1024  # characters of a piece with many containers
_MANY: Final = 2000  # containers in one piece, which the garbage collector traverses at once
_CLOSINGS: Final = {"[": "]", "{": "}"}
_SPACE: Final = re.compile(r"[ \t\n\r]*").match


class Line:
    """A queue of the tasks that decode large packets; each loop iteration resumes one of them.

    However many clients send large packets, all other tasks wait for one time slice only, not for
    one per such client.

    Args:
        runtime: Provides the event loop. Threads need no queue: the interpreter switches them.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._waiting: deque[Flag] = deque()
        self._is_moving = False

    def pause(self) -> None:
        """Wait until the tasks ahead in the queue, and all other tasks, have run."""
        if not self._runtime.can_kill:
            self._runtime.yield_control()
            return
        turn = self._runtime.flag()
        self._waiting.append(turn)
        if not self._is_moving:
            self._is_moving = True
            self._runtime.start(self._move)
        turn.wait(_PATIENCE)

    def _move(self) -> None:
        try:
            while self._waiting:
                self._runtime.yield_control()
                self._waiting.popleft().set()
        finally:
            self._is_moving = False


class TimeSlice:
    """Pauses the task at the first check, and then whenever its time slice is used up.

    Args:
        pause: Lets other tasks run, then returns.
    """

    __slots__ = ("_pause", "_until")

    def __init__(self, pause: Callable[[], object]) -> None:
        self._pause = pause
        self._until = 0.0

    def check(self) -> None:
        """If the time slice is used up, pause and begin a new one."""
        if clock() >= self._until:
            self._pause()
            self._until = clock() + TIME_SLICE


class PieceDecoder:
    """Decodes one JSON text piece by piece.

    The result is the same as if the text were decoded at once: a part of a list that is valid JSON
    when put in brackets must end between two values of that list.

    Args:
        text: JSON.
        scan_for: Given a text, returns the function that decodes the value at a position in it;
            may choose by the text's content.
        max_containers: Largest number of lists and objects that *text* may hold.
        take_turn: Called before each piece; lets other tasks run when the time slice is used up.
    """

    __slots__ = ("_left", "_max_containers", "_most", "_scan_for", "_take_turn", "_text")

    def __init__(
        self,
        text: str,
        *,
        scan_for: Callable[[str], Scan],
        max_containers: int,
        take_turn: Callable[[], object],
    ) -> None:
        self._text = text
        self._scan_for = scan_for
        self._max_containers = self._left = max_containers
        self._take_turn = take_turn
        self._most = _MOST

    def decode(self) -> Any:
        """Return the decoded value.

        Raises:
            TooManyContainers: The text holds more than *max_containers* lists and objects.
            TooDeep: They are nested deeper than :data:`~.shape.MAX_DEPTH`.
            ValueError: The text is not valid JSON.
        """
        text = self._text
        try:
            value, end = self._value(_skip(text, 0), 1)
        except StopIteration as exc:
            raise ValueError(f"no value at {exc.value}") from None
        except RecursionError:
            raise TooDeep("nested too deep") from None
        if _skip(text, end) != len(text):
            raise ValueError(f"extra data at {end}")
        return value

    def _value(self, at: int, depth: int) -> tuple[Any, int]:
        """Return the value at *at* and its end; a container there would have depth *depth*."""
        text = self._text
        if text[at : at + 1] in _CLOSINGS:
            return self._container(at, depth)
        return self._scan_for(text)(text, at)  # the longest string takes 4 ms

    def _container(self, at: int, depth: int) -> tuple[Any, int]:
        if depth > MAX_DEPTH:
            raise TooDeep("nested too deep")
        self._count(1)
        text = self._text
        opening = text[at]
        closing = _CLOSINGS[opening]
        values: Any = [] if opening == "[" else {}
        add = values.extend if opening == "[" else values.update
        at = _skip(text, at + 1)
        if text[at : at + 1] == closing:
            return values, at + 1
        size, slow_until, separator, has_failed = _FIRST, 0, "", False
        while True:
            self._take_turn()
            window = text[at : at + size]
            is_slow = at < slow_until
            cut = _cut(window, separator, is_careful=has_failed) if not is_slow else 0
            if cut > 0:
                piece, end = self._piece(f"{opening}{window[:cut]}{closing}", depth)
                if piece:
                    add(piece)
                    if end <= cut + 1:
                        return values, at + end - 1  # the container ended before the cut
                    at += cut + 1
                    size = min(2 * size, self._most)
                    continue
                # The failed attempt has cost a scan of this text: decode it value by value.
                slow_until, size, is_slow, has_failed = at + cut, _FIRST, True, True
                window = window[:size]
            behind = 0
            while member := self._member(window, behind, closing, depth):
                key, value, end, after = member
                add((value,)) if key is None else add({key: value})
                behind = after + 1
                if window[after] == closing:
                    return values, at + behind
                separator = _separator_at(window, end, after)
                if not is_slow:
                    break
            if behind:
                at += behind
                continue
            key, value, end = self._large_member(at, depth, is_object=opening == "{")
            add((value,)) if key is None else add({key: value})
            size = min(max(size, 2 * (end - at)), self._most)
            at = _skip(text, end)
            if text[at : at + 1] == closing:
                return values, at + 1
            if text[at : at + 1] != ",":
                raise ValueError(f"no comma at {at}")
            at += 1

    def _piece(self, piece: str, depth: int) -> tuple[Any, int]:
        """Decode *piece*, a part of a container at *depth* with brackets put around it.

        Returns:
            The list or object, ``None`` if *piece* is not valid JSON, and where it ends. An end
            before that of *piece* means that the container itself ends there.
        """
        try:
            value, end = without_gc(self._scan_for(piece), piece)
        except (ValueError, StopIteration):
            return None, 0
        self._look(piece if end == len(piece) else piece[:end], depth - 1, known=1)
        return value, end

    def _member(
        self, window: str, at: int, closing: str, depth: int
    ) -> tuple[str | None, Any, int, int] | None:
        """Decode the value or the object member at *at* if *window* holds all of it.

        Returns:
            Its key (``None`` in a list), its value, where it ends, and the position of the comma
            or bracket after it; ``None`` if *window* is too short.
        """
        scan = self._scan_for(window)
        key = None
        try:
            if closing == "}":
                key, at = self._key(window, at, scan)
            start = _skip(window, at)
            value, end = scan(window, start)
        except (ValueError, StopIteration):
            return None
        after = _skip(window, end)
        if window[after : after + 1] not in (",", closing) or after == len(window):
            return None
        self._look(window[start:end], depth)
        return key, value, end, after

    def _large_member(self, at: int, depth: int, *, is_object: bool) -> tuple[Any, Any, int]:
        text = self._text
        key = None
        if is_object:
            key, at = self._key(text, at, self._scan_for(text))
        value, end = self._value(_skip(text, at), depth + 1)
        return key, value, end

    @staticmethod
    def _key(text: str, at: int, scan: Scan) -> tuple[str, int]:
        at = _skip(text, at)
        if text[at : at + 1] != '"':
            raise ValueError(f"no key at {at}")
        key, at = scan(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise ValueError(f"no colon at {at}")
        return key, at + 1

    def _look(self, piece: str, depth: int, *, known: int = 0) -> None:
        """Check depth and number of the containers in *piece*, which is nested at *depth*."""
        if piece.find("[", known) < 0 and piece.find("{", known) < 0:
            return
        count, deepest = shape_of(piece)
        if depth + deepest > MAX_DEPTH:
            raise TooDeep("nested too deep")
        self._count(count - known)
        self._most = _MOST if count <= _MANY else _FEWER

    def _count(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            bound = self._max_containers
            raise TooManyContainers(f"more than {bound} lists and objects")


def _skip(text: str, at: int) -> int:
    """Return the position after the white space at *at*."""
    match = _SPACE(text, at)
    assert match is not None
    return match.end()


def _separator_at(window: str, end: int, after: int) -> str:
    """Return the comma at *after*, with a closing quote or bracket before it and what follows.

    A longer separator is less likely to occur inside a string or a nested container.
    """
    before = window[end - 1]
    if end != after or before not in ']}"':
        return ","
    return f"{before},{window[after + 1 : after + 2]}"


def _cut(window: str, separator: str, *, is_careful: bool) -> int:
    """Return the position in *window* where a piece may end: its last comma like *separator*.

    Args:
        window: Text that begins with a value.
        separator: See :func:`_separator_at`; empty if none was seen yet.
        is_careful: Whether to prefer a comma before which the brackets are balanced.

    Returns:
        The position; 0 or less if there is none.
    """
    if not separator:
        return 0
    first = at = window.rfind(separator)
    if is_careful:
        for _ in range(_LOOKS):
            if at <= 0 or _is_balanced(window[: at + separator.find(",")]):
                break
            at = window.rfind(separator, 0, at)
        else:
            at = first
    return at + separator.find(",")


def _is_balanced(text: str) -> bool:
    """Return whether as many brackets close as open, ignoring that strings may hold some."""
    return text.count("[") == text.count("]") and text.count("{") == text.count("}")


def without_gc(scan: Scan, text: str) -> tuple[Any, int]:
    """Decode *text* with garbage collection off: it would run every 700 lists and find nothing."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        return scan(text, 0)
    finally:
        if is_collecting:
            gc.enable()
