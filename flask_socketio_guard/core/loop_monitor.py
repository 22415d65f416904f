"""Detects, from another thread, what blocks an event loop.

Independent of the kind of event loop: ``runtime`` supplies it.
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

# Documented and public, despite its name.
from sys import _current_frames as current_frames
from traceback import walk_stack
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNKNOWN: Final = "an unknown place"
"""The place of a block if its thread no longer has a stack."""

_MIN_LOOKS = 8  # within the threshold
_WORKING_SHARE = 0.25  # of one core; other processes may compete for it
_MIN_INTERVAL = 0.005
_MAX_INTERVAL = 0.25
_MAX_FRAMES = 100
_SOURCES_TIMEOUT = 1.0
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


class Frame(NamedTuple):
    """One frame of a thread's stack.

    Attributes:
        filename: Of the source.
        lineno: Counted from 1.
        name: Of the function.
    """

    filename: str
    lineno: int
    name: str


class LoopMonitor:
    """Pings an event loop at short intervals and reports where it is blocked.

    The monitor asks again at its first look after the last answer, so a question that stays open
    was asked within one interval of the block's start. The start is taken to be in the middle of
    that interval. A block is reported once it has lasted for the threshold, and its length when
    it is over, both accurate to half an interval. The interval is 5 to 250 ms: 47 ms for a
    threshold of 0.4 s, at which a block is detected after 0.38 to 0.43 s.

    A C function that does not release the GIL (a regular expression, a large JSON text) stops
    the monitor, too, and is reported as soon as it releases it. It uses CPU time, unlike a
    process that was suspended or a machine that slept. Time in which the monitor did not run and
    the process used little CPU therefore counts only in part.

    Nothing counts as a block before the loop has answered for the first time: a process that is
    still loading its application, or a test that runs no loop, is not blocked.

    Args:
        threshold: In seconds, > 0.
        ask: Makes the loop call :meth:`answer`; callable in any thread. An exception
            means that the loop no longer exists.
        thread_ident: Of the native thread in which the loop runs.
        on_block: Called once for each block, with place and stack, in the monitor's
            thread while the loop is still blocked. Exceptions are ignored.
        on_unblock: Called with place and length in seconds, in the loop's thread
            by the loop itself; must not wait and must not raise.
        sleep: Must block only the monitor's thread.
        clock: Monotonic, in seconds.
        processor_clock: CPU time of this process, in seconds.

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
            # Missed looks are skipped.
            next_look_at = max(next_look_at + self.interval, now)
            self._sleep(next_look_at - now)
            if not self._is_stopped:
                self.look()

    def stop(self) -> None:
        """Make :meth:`run` return at its next look; callable in any thread."""
        self._is_stopped = True

    def answer(self) -> None:
        """Record that the loop runs; called in its thread, once for each question."""
        self._answered_at = self._clock()
        self._has_answered = True
        while self._ended:
            self._on_unblock(*self._ended.popleft())

    def look(self) -> None:
        """Ask, unless a question is open; report a block once it was open for too long."""
        passed = self._time_since_last_look()
        # Half an interval for the time before the question, and half an interval for the
        # jitter of the looks.
        enough = self._threshold - self.interval
        is_new = self._place is None and self._has_answered
        if self._answered_at is None:
            self._open_for += passed
            if not is_new:
                return
            if self._open_for > enough:
                self._tell(frames_of(self._thread_ident))
            elif self.interval < self._open_for < enough - self.interval:
                # Each file access releases the GIL, and a thread that computes gives it back
                # only after 5 ms: the sources of a deep stack would take a second.
                self._sources.read(frames_of(self._thread_ident), self.interval / 2)
                self._open_for += self._time_since_last_look()
        elif is_new and passed > self._threshold:
            # The monitor itself could not run. It should have asked one interval after the
            # last look. The code that held the GIL has just released it.
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
        except Exception:  # noqa: BLE001 - the loop no longer exists
            self.stop()

    def _tell(self, frames: Sequence[Frame]) -> None:
        self._place = place_of(frames)
        with contextlib.suppress(BaseException):  # the next block must be reported, too
            self._on_block(self._place, self._sources.text_of(frames))


class _Sources:
    """Remembers which sources were read, so that a stack can be formatted without waiting.

    Args:
        clock: Monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._names: set[str] = set()

    def read(self, frames: Sequence[Frame], timeout: float) -> None:
        """Read the sources of *frames*, innermost first; *timeout* is checked after each file."""
        deadline = self._clock() + timeout
        for frame in reversed(frames):
            if frame.filename not in self._names:
                linecache.getlines(frame.filename)
                self._names.add(frame.filename)
                if self._clock() >= deadline:
                    break

    def text_of(self, frames: Sequence[Frame]) -> str:
        """Return *frames* formatted as a traceback, with source lines where they were read."""
        lines = []
        for frame in frames:
            filename, lineno, name = frame
            lines.append(f'  File "{filename}", line {lineno}, in {name}\n')
            is_read = filename in self._names
            if is_read and (source := linecache.getline(filename, lineno).strip()):
                lines.append(f"    {source}\n")
        return "".join(lines)


def frames_of(thread_ident: int) -> list[Frame]:
    """Return the stack of a native thread, outermost frame first; the innermost 100 at most."""
    innermost = current_frames().get(thread_ident)
    if innermost is None:
        return []
    # Collected before anything else, because the thread keeps running.
    walked = list(islice(walk_stack(innermost), _MAX_FRAMES))
    return [
        Frame(frame.f_code.co_filename, lineno, frame.f_code.co_name)
        for frame, lineno in reversed(walked)
    ]


def place_of(frames: Sequence[Frame]) -> str:
    """Return ``file:line in function`` of the innermost frame of the application.

    Falls back to the innermost frame outside the standard library, then to the innermost frame,
    then to :data:`UNKNOWN`.
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
    """Return whether a file belongs to the standard library.

    Folders of installed packages lie inside it and do not count.
    """
    return filename.startswith("<frozen ") or (
        filename.startswith(_standard_folders())
        and not any(folder in filename for folder in _INSTALLED)
    )


@cache
def _standard_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({os.path.join(paths[name], "") for name in ("stdlib", "platstdlib")})
