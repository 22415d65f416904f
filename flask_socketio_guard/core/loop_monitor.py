"""Finds out, from another thread, what keeps an event loop from running.

Knows no event loop: ``runtime`` brings one.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import sysconfig
import time
from collections import deque
from functools import cache
from itertools import islice

# Documented and not private, whatever its name says.
from sys import _current_frames as current_frames
from traceback import walk_stack
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNKNOWN: Final = "an unknown place"
"""The place of a block whose thread has no stack any more."""

_MIN_LOOKS = 8  # within the threshold
_WORKING_SHARE = 0.25  # other processes want the processor too
_MIN_INTERVAL = 0.005
_MAX_INTERVAL = 0.25
_MAX_FRAMES = 100
_SOURCES_TIMEOUT = 1.0
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


class Frame(NamedTuple):
    """What a thread executes, or where it called that.

    Attributes:
        filename: Of the source.
        lineno: From 1 on.
        name: Of the function.
    """

    filename: str
    lineno: int
    name: str


class LoopMonitor:
    """Asks an event loop in short intervals whether it runs, and tells where it hangs.

    A question is asked at the first look after the last one was answered, so one
    that stays open was asked within an interval of the block's beginning. That is
    taken to be in the middle. The block is told when it has lasted for the
    threshold, and its length afterwards, both give or take half an interval. That
    is 5 to 250 ms long: 47 ms with a threshold of 0.4 s, at which a block is known
    after 0.38 to 0.43 s.

    A C function that does not let go of the interpreter (a regular expression, a
    large JSON text) keeps the monitor from looking, too. It is told as soon as it
    lets go. What tells it from a process that was halted, or a machine that slept,
    is that it takes processor time; without that, time in which the monitor did
    not run counts only in part.

    Nothing is a block before the loop has answered for the first time: a process
    that still loads its application, or a test that runs no loop, does not hang.

    Args:
        threshold: In seconds, > 0.
        ask: Makes the loop call :meth:`answer`; callable in any thread. What it
            raises means that there is no loop any more.
        thread_ident: Of the native thread that the loop runs in.
        on_block: Called with place and stack by the monitor's thread, while the
            loop still hangs; once for each block. What it raises is lost.
        on_unblock: Called with place and length in seconds in the loop's thread,
            by the loop itself; it must not wait and must not raise.
        sleep: Must hold up the monitor's thread only.
        clock: Monotonic, in seconds.
        processor_clock: Seconds of processor time that this process has taken.

    Attributes:
        interval: Seconds between two looks.
    """

    def __init__(
        self,
        threshold: float,
        *,
        ask: Callable[[], object],
        thread_ident: int,
        on_block: Callable[[str, str], object],
        on_unblock: Callable[[str, float], object],
        sleep: Callable[[float], object],
        clock: Callable[[], float] = time.monotonic,
        processor_clock: Callable[[], float] = time.process_time,
    ) -> None:
        looks = max(_MIN_LOOKS, round(threshold / _MAX_INTERVAL))
        self.interval = max(threshold / (looks + 0.5), _MIN_INTERVAL)
        self._threshold = threshold
        self._ask = ask
        self._thread_ident = thread_ident
        self._on_block = on_block
        self._on_unblock = on_unblock
        self._sleep = sleep
        self._clock = clock
        self._processor_clock = processor_clock
        self._is_stopped = False
        self._has_answered = False
        self._asked_at = 0.0
        self._answered_at: float | None = 0.0  # None while a question is open
        self._open_for = 0.0
        self._looked_at = clock()
        self._processor_looked_at = processor_clock()
        self._place: str | None = None
        self._sources = _Sources(clock)
        self._ended: deque[tuple[str, float]] = deque()

    def run(self) -> None:
        """Look until :meth:`stop`; the body of the monitor's thread."""
        next_look_at = self._clock()
        while not self._is_stopped:
            now = self._clock()
            # Looks that were missed are not made up for.
            next_look_at = max(next_look_at + self.interval, now)
            self._sleep(next_look_at - now)
            if not self._is_stopped:
                self.look()

    def stop(self) -> None:
        """Let :meth:`run` return, at its next look; callable in any thread."""
        self._is_stopped = True

    def answer(self) -> None:
        """Say that the loop runs; called in its thread, once for each question."""
        self._answered_at = self._clock()
        self._has_answered = True
        while self._ended:
            self._on_unblock(*self._ended.popleft())

    def look(self) -> None:
        """Ask, unless a question is open; tell of a block when it has been so for too long."""
        passed = self._time_since_last_look()
        # Half an interval for the time before the question, and half an interval for
        # looks that come a little early or late.
        enough = self._threshold - self.interval
        is_new = self._place is None and self._has_answered
        if self._answered_at is None:
            self._open_for += passed
            if not is_new:
                return
            if self._open_for > enough:
                self._tell(frames_of(self._thread_ident))
            elif self.interval < self._open_for < enough - self.interval:
                # Each access to a file costs the interpreter, which work that hangs gives
                # back after 5 ms only: the sources of a deep stack would take a second.
                self._sources.read(frames_of(self._thread_ident), self.interval / 2)
                self._open_for += self._time_since_last_look()
        elif is_new and passed > self._threshold:
            # Nobody could look. The next question should have been asked an interval
            # after the last look. What did this has just let go.
            frames = frames_of(self._thread_ident)
            self._ask_again(self._looked_at - passed + self.interval)
            self._sources.read(frames, _SOURCES_TIMEOUT)
            self._tell(frames)
        else:
            if self._place is not None:
                lasted = self._answered_at - self._asked_at + self.interval / 2
                self._ended.append((self._place, lasted))
                self._place = None
            self._ask_again(self._looked_at)

    def _time_since_last_look(self) -> float:
        now, processor_now = self._clock(), self._processor_clock()
        passed, worked = now - self._looked_at, processor_now - self._processor_looked_at
        self._looked_at, self._processor_looked_at = now, processor_now
        return passed if worked > passed * _WORKING_SHARE else min(passed, self._threshold / 2)

    def _ask_again(self, asked_at: float) -> None:
        self._answered_at = None
        self._open_for = 0.0
        self._asked_at = asked_at
        try:
            self._ask()
        except Exception:  # noqa: BLE001 - there is no loop any more, and nothing to watch
            self.stop()

    def _tell(self, frames: Sequence[Frame]) -> None:
        self._place = place_of(frames)
        with contextlib.suppress(BaseException):  # the next block shall be told too
            self._on_block(self._place, self._sources.text_of(frames))


class _Sources:
    """Knows which sources have been read, so that a stack can be written without waiting.

    Args:
        clock: Monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._names: set[str] = set()

    def read(self, frames: Sequence[Frame], timeout: float) -> None:
        """Read the sources of *frames*, innermost first, for *timeout* seconds and one file."""
        deadline = self._clock() + timeout
        for frame in reversed(frames):
            if frame.filename not in self._names:
                linecache.getlines(frame.filename)
                self._names.add(frame.filename)
                if self._clock() >= deadline:
                    break

    def text_of(self, frames: Sequence[Frame]) -> str:
        """Return *frames* as in a traceback, with the lines of what has been read."""
        lines = []
        for frame in frames:
            filename, lineno, name = frame
            lines.append(f'  File "{filename}", line {lineno}, in {name}\n')
            is_read = filename in self._names
            if is_read and (source := linecache.getline(filename, lineno).strip()):
                lines.append(f"    {source}\n")
        return "".join(lines)


def frames_of(thread_ident: int) -> list[Frame]:
    """Return what the native thread executes, outermost frame first; no more than 100."""
    innermost = current_frames().get(thread_ident)
    if innermost is None:
        return []
    # Collected before anything else: the thread may go on meanwhile.
    walked = list(islice(walk_stack(innermost), _MAX_FRAMES))
    return [
        Frame(frame.f_code.co_filename, lineno, frame.f_code.co_name)
        for frame, lineno in reversed(walked)
    ]


def place_of(frames: Sequence[Frame]) -> str:
    """Return ``file:line in function`` of the innermost frame of the application.

    Without one: of the innermost frame outside the standard library, of the
    innermost frame, or :data:`UNKNOWN`.
    """
    inside_out = [*reversed(frames)]
    candidates = (
        *(frame for frame in inside_out if _is_application(frame.filename)),
        *(frame for frame in inside_out if not _is_standard(frame.filename)),
        *inside_out,
    )
    if not candidates:
        return UNKNOWN
    frame = candidates[0]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def _is_application(filename: str) -> bool:
    return not (
        _is_standard(filename)
        or filename.startswith(_PACKAGE)
        or any(folder in filename for folder in _INSTALLED)
    )


def _is_standard(filename: str) -> bool:
    """Say whether a file is of the standard library, which has packages installed in it."""
    return filename.startswith("<frozen ") or (
        filename.startswith(_standard_folders())
        and not any(folder in filename for folder in _INSTALLED)
    )


@cache
def _standard_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({os.path.join(paths[name], "") for name in ("stdlib", "platstdlib")})
