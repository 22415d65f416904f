"""Folds repeated log lines: the first of a class is written, the rest are counted."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from ..core.forks import renew_after_fork
from ..core.runtime import clock as monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

MAX_CLASSES = 64
"""Classes of lines that are told apart at a time; whatever else comes is one class more."""

OTHERS: Final = "others"
"""The class of all that are too many to be told apart."""

_LONGEST_TEMPLATE = 200  # characters of another's message that make a class
_UPSTREAM = ("socketio", "engineio", "geventwebsocket")


@dataclass(frozen=True)
class Line:
    """How the repeats of a class are told.

    Attributes:
        logger: Where.
        level: How loud.
        text: What happened again; nothing in it may come from a client unescaped.
    """

    logger: logging.Logger
    level: int
    text: str


@dataclass(frozen=True)
class Folded:
    """Repeats of one class that nobody has been told of yet.

    Attributes:
        key: The class, or :data:`OTHERS`.
        line: How they are told.
        count: How many things happened.
        lines: How many lines were kept back; one line may tell of several things.
        seconds: Since the class was last told of.
    """

    key: Hashable
    line: Line
    count: int
    lines: int
    seconds: float

    def tell(self) -> None:
        """Write the one line."""
        self.line.logger.log(
            self.line.level,
            "%s ... %d more in %d s",
            self.line.text,
            self.count,
            max(1, round(self.seconds)),
            extra={"folded": self.lines},
        )


@dataclass(slots=True)
class _Window:
    """The time during which repeats of one class are kept back."""

    line: Line
    opened_at: float
    burst: int
    passed: int = 1
    count: int = 0
    lines: int = 0


class LogDeduplicator:
    """Decides which lines of a log are written and which are only counted.

    Two lines of one class, the one that tells of the rest included, are never
    closer than *interval*. Nothing waits longer than that to be told, provided
    that :meth:`due` is asked often. Safe for threads and greenlets.

    Args:
        interval: In seconds, > 0.
        clock: Monotonic, in seconds.
    """

    def __init__(self, interval: float, *, clock: Callable[[], float] = monotonic) -> None:
        self._interval = interval
        self._clock = clock
        # A garbage collection may run code that logs, in the midst of what holds this.
        self._lock = threading.RLock()
        renew_after_fork(self, _lock=threading.RLock)
        # In the order in which they were opened, and so in that in which they end.
        self._windows: dict[Hashable, _Window] = {}
        self._totals: Counter[Hashable] = Counter()

    @property
    def counts(self) -> dict[Hashable, int]:
        """How many lines were kept back since the start, by class."""
        with self._lock:
            return dict(self._totals)

    def admit(self, key: Hashable, line: Line, *, count: int = 1, burst: int = 1) -> bool:
        """Return whether to write a line now; otherwise it is counted.

        Args:
            key: Its class.
            line: How repeats are told; that of the first of the class is kept.
            count: How many things the line tells of.
            burst: How many lines of the class are written in each interval, >= 1.
        """
        with self._lock:
            if key not in self._windows and len(self._windows) >= MAX_CLASSES:
                key, line, burst = OTHERS, replace(line, text="lines of other kinds"), 1
            now = self._clock()
            window = self._windows.get(key)
            if window is None or (not window.lines and self._is_over(window, now)):
                self._open(key, _Window(line, now, burst))
                return True
            if window.passed < window.burst:
                window.passed += 1
                return True
            window.count += count
            window.lines += 1
            is_known = key in self._totals or len(self._totals) < MAX_CLASSES
            self._totals[key if is_known else OTHERS] += 1
            return False

    def due(self) -> list[Folded]:
        """Return what is to be told now; the caller does so, and asks again soon."""
        with self._lock:
            now = self._clock()
            found = []
            for key, window in list(self._windows.items()):
                if not self._is_over(window, now):
                    break
                del self._windows[key]
                if window.lines:
                    found.append(self._folded(key, window, now))
                    self._open(key, _Window(window.line, now, window.burst))
            return found

    def flush(self) -> list[Folded]:
        """Return all that nobody was told of, whether due or not, and begin anew."""
        with self._lock:
            now = self._clock()
            windows, self._windows = self._windows, {}
            return [
                self._folded(key, window, now) for key, window in windows.items() if window.lines
            ]

    def _open(self, key: Hashable, window: _Window) -> None:
        self._windows.pop(key, None)  # so that it goes to the end
        self._windows[key] = window

    def _is_over(self, window: _Window, now: float) -> bool:
        return now >= window.opened_at + self._interval

    def _folded(self, key: Hashable, window: _Window, now: float) -> Folded:
        return Folded(key, window.line, window.count, window.lines, now - window.opened_at)


class LoggerDeduplication:
    """One application's part in folding what the packages underneath log.

    Their loggers are usually shared by all applications of a process, so there
    is one filter for each logger. It stays for as long as one of these does.

    Only lines of python-socketio, python-engineio and gevent-websocket are
    folded, and of those only warnings and errors without a traceback: the
    application may have given them a logger that it uses itself.

    Args:
        logger: Theirs.
        interval: As for :class:`LogDeduplicator`; that of the first application counts.
        on_folded: Called without arguments for each line that is kept back; of
            several applications the first is called.
        clock: As for :class:`LogDeduplicator`.
    """

    def __init__(
        self,
        logger: logging.Logger,
        interval: float,
        *,
        on_folded: Callable[[], object],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.on_folded = on_folded
        with _attaching:
            found = [known for known in logger.filters if isinstance(known, _RepeatFilter)]
            if found:
                self._filter = found[0]
            else:
                self._filter = _RepeatFilter(logger, LogDeduplicator(interval, clock=clock))
                logger.addFilter(self._filter)
            self._filter.add(self)

    @property
    def counts(self) -> dict[Hashable, int]:
        """How many lines were kept back, by (name of the logger, text before formatting)."""
        return self._filter.folder.counts

    def tick(self) -> None:
        """Tell what is due."""
        tell(self._filter.folder.due())

    def flush(self) -> None:
        """Tell everything that has not been told."""
        tell(self._filter.folder.flush())


class _RepeatFilter(logging.Filter):
    """Sits on one logger, for all who have a :class:`LoggerDeduplication` of it."""

    def __init__(self, logger: logging.Logger, folder: LogDeduplicator) -> None:
        super().__init__()
        self.folder = folder
        self._logger = logger
        self._owners: list[weakref.ref[LoggerDeduplication]] = []

    def add(self, owner: LoggerDeduplication) -> None:
        self._owners.append(weakref.ref(owner, self._remove))

    def filter(self, record: logging.LogRecord) -> bool:
        if hasattr(record, "folded") or not _is_foldable(record):
            return True
        # Also here, because an application that has not started does not tick.
        tell(self.folder.due())
        template = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        template = template[:_LONGEST_TEMPLATE]
        line = Line(self._logger, record.levelno, repr(template))
        if self.folder.admit((record.name, template), line):
            return True
        for reference in list(self._owners):
            owner = reference()
            if owner is not None:
                owner.on_folded()
                break
        return False

    def _remove(self, reference: weakref.ref[LoggerDeduplication]) -> None:
        with _attaching:
            self._owners.remove(reference)
            if not self._owners:
                self._logger.removeFilter(self)


_attaching = threading.RLock()  # an application may be collected while another is made
renew_after_fork(sys.modules[__name__], _attaching=threading.RLock)


def tell(repeats: Iterable[Folded]) -> None:
    """Write the line of each."""
    for folded in repeats:
        folded.tell()


def _is_foldable(record: logging.LogRecord) -> bool:
    return (
        logging.WARNING <= record.levelno <= logging.ERROR
        and not record.exc_info
        and (
            record.name.partition(".")[0] in _UPSTREAM
            or record.pathname.startswith(_upstream_folders())
        )
    )


@cache
def _upstream_folders() -> tuple[str, ...]:
    specs = [find_spec(name) for name in _UPSTREAM]
    return tuple(
        os.path.join(folder, "")
        for spec in specs
        if spec is not None
        for folder in spec.submodule_search_locations or ()
    )
