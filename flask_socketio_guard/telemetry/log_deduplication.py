"""Log deduplication: of similar lines, the first is written and the rest are counted.

A *class* is a set of lines that count as repeats of each other. Repeats are *folded*: suppressed,
and summed up in one line at the end of the interval.
"""

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
"""Most classes that are tracked at a time; lines of further classes share :data:`OTHERS`."""

OTHERS: Final = "others"
"""The class of all lines beyond :data:`MAX_CLASSES`."""

_LONGEST_TEMPLATE = 200  # characters of an upstream message that identify its class
_UPSTREAM = ("socketio", "engineio", "geventwebsocket")


@dataclass(frozen=True)
class Line:
    """How the repeats of a class are summed up.

    Attributes:
        logger: Logger of the summary line.
        level: Level of the summary line.
        text: Describes the repeats; input from clients in it must be escaped.
    """

    logger: logging.Logger
    level: int
    text: str


@dataclass(frozen=True)
class Folded:
    """Repeats of one class that have not been reported yet.

    Attributes:
        key: The class, or :data:`OTHERS`.
        line: How they are summed up.
        count: Number of events.
        lines: Number of suppressed lines; one line may stand for several events.
        seconds: Time since the last line of the class.
    """

    key: Hashable
    line: Line
    count: int
    lines: int
    seconds: float

    def tell(self) -> None:
        """Write the summary line."""
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
    """The interval in which repeats of one class are suppressed."""

    line: Line
    opened_at: float
    burst: int
    passed: int = 1
    count: int = 0
    lines: int = 0


class LogDeduplicator:
    """Decides which log lines are written and which are only counted.

    Unless a larger *burst* is allowed, two lines of one class, summaries included, are
    at least *interval* apart. No repeat waits longer than that to be reported, provided
    that :meth:`due` is called often. Safe for threads and greenlets.

    Args:
        interval: In seconds, > 0.
        clock: Monotonic, in seconds.
    """

    def __init__(self, interval: float, *, clock: Callable[[], float] = monotonic) -> None:
        self._interval = interval
        self._clock = clock
        # Reentrant: a garbage collection may run code that logs while this thread holds it.
        self._lock = threading.RLock()
        renew_after_fork(self, _lock=threading.RLock)
        # In the order in which they were opened, which is also the order in which they end.
        self._windows: dict[Hashable, _Window] = {}
        self._totals: Counter[Hashable] = Counter()

    @property
    def counts(self) -> dict[Hashable, int]:
        """Number of lines suppressed since the start, by class."""
        with self._lock:
            return dict(self._totals)

    def admit(self, key: Hashable, line: Line, *, count: int = 1, burst: int = 1) -> bool:
        """Return whether to write a line now; otherwise it is counted.

        Args:
            key: The class of the line.
            line: How repeats are summed up; the first one of a class is used.
            count: Number of events that the line stands for.
            burst: Lines of the class to write in each interval, >= 1.
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
        """Return the repeats whose interval is over; the caller must write their summaries."""
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
        """Return all unreported repeats, due or not, and forget all classes."""
        with self._lock:
            now = self._clock()
            windows, self._windows = self._windows, {}
            return [
                self._folded(key, window, now) for key, window in windows.items() if window.lines
            ]

    def _open(self, key: Hashable, window: _Window) -> None:
        self._windows.pop(key, None)  # moves it to the end
        self._windows[key] = window

    def _is_over(self, window: _Window, now: float) -> bool:
        return now >= window.opened_at + self._interval

    def _folded(self, key: Hashable, window: _Window, now: float) -> Folded:
        return Folded(key, window.line, window.count, window.lines, now - window.opened_at)


class LoggerDeduplication:
    """Deduplicates, for one application, the log of the upstream packages.

    All applications of a process usually share the upstream loggers, so there is one
    filter for each logger, which stays as long as one object of this class refers to it.

    Only lines of python-socketio, python-engineio and gevent-websocket are
    folded, and of those only warnings and errors without a traceback: the
    application may have given them a logger that it uses itself.

    Args:
        logger: A logger of these packages.
        interval: As for :class:`LogDeduplicator`; the first application decides.
        on_folded: Called without arguments for each suppressed line; with several
            applications, only that of the first one is called.
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
        """Number of suppressed lines, by (name of the logger, text before formatting)."""
        return self._filter.folder.counts

    def tick(self) -> None:
        """Write the summaries that are due."""
        tell(self._filter.folder.due())

    def flush(self) -> None:
        """Write the summaries of all unreported repeats."""
        tell(self._filter.folder.flush())


class _RepeatFilter(logging.Filter):
    """The filter of one logger, shared by its :class:`LoggerDeduplication` objects."""

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
        # Checked here too, because an application that has not started does not tick.
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


_attaching = threading.RLock()  # one application may be collected while another one is created
renew_after_fork(sys.modules[__name__], _attaching=threading.RLock)


def tell(repeats: Iterable[Folded]) -> None:
    """Write the summary lines of *repeats*."""
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
