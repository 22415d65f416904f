"""Writes records to the log, on the logger ``flask_socketio_guard``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..core.component import Component
from .log_deduplication import Line, LogDeduplicator, LoggerDeduplication, tell
from .printable import printable_traceback
from .records import logger, record_classes, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .records import Record


class LogLines(Component):
    """Writes the log of one application.

    Each record class formats its own line; see :class:`~.records.base.Record`. Repeats of a line
    are suppressed, counted, and summed up in one line.

    Args:
        sender: The application whose signals are logged.
        fold_interval: Seconds for which repeats are suppressed, > 0.
        loggers: Loggers of the upstream packages. Their repeats are suppressed, too, for
            as long as this object exists; objects that are not loggers of the standard
            library are ignored.
        count: Called as ``count("log_lines_folded", 1)`` for each suppressed line.
    """

    def __init__(
        self,
        sender: object,
        *,
        fold_interval: float = 60.0,
        loggers: Iterable[logging.Logger] = (),
        count: Callable[[str, int], object] | None = None,
    ) -> None:
        def on_folded() -> None:
            if count is not None:
                count("log_lines_folded", 1)

        self._on_folded = on_folded
        self.folder = LogDeduplicator(fold_interval)
        self._logger_folds = [
            LoggerDeduplication(each, fold_interval, on_folded=on_folded)
            for each in _unwrapped(loggers)
        ]
        self._subscriptions = [
            subscribe(kind.signal, sender, self._write) for kind in record_classes()
        ]

    def tick(self) -> None:
        """Write the summaries that are due; called every tick."""
        tell(self.folder.due())
        for fold in self._logger_folds:
            fold.tick()

    def stop(self, timeout: float) -> None:
        """Write all summaries and release the upstream loggers; there are no more ticks.

        Repeats of records are still suppressed after that, and summed up when the next record is
        logged.
        """
        del timeout
        tell(self.folder.flush())
        for fold in self._logger_folds:
            fold.flush()
        self._logger_folds.clear()

    def _write(self, record: Record) -> None:
        level = record.level
        if level is None or not logger.isEnabledFor(level):
            return
        entry = record.entry()
        fold = entry.fold
        if fold is not None:
            tell(self.folder.due())  # a write-only process does not tick
            line = Line(logger, level, fold.repeated)
            if not self.folder.admit(fold.key, line, count=fold.count, burst=fold.burst):
                self._on_folded()
                return
        logger.log(
            level, entry.message, *entry.arguments, exc_info=entry.exception, extra=entry.extra
        )


class _Printable(logging.Filter):
    """Makes every line of the guard's loggers safe to write, wherever it is logged."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
            # Formatters write this instead of formatting the exception themselves.
            record.exc_text = printable_traceback(record.exc_info[1], record.exc_info[2])
        message = record.getMessage()
        try:
            message.encode()
        except UnicodeEncodeError:  # a lone surrogate: handlers would lose the record
            record.msg = message.encode("utf-8", "backslashreplace").decode()
            record.args = ()
        return True


for _each in (logger, logger.getChild("websocket")):  # a child logger does not inherit filters
    _each.addFilter(_Printable())


def _unwrapped(loggers: Iterable[object]) -> list[logging.Logger]:
    """Return the distinct loggers of the standard library among *loggers*, without adapters."""
    found = [each.logger if isinstance(each, logging.LoggerAdapter) else each for each in loggers]
    return list(dict.fromkeys(each for each in found if isinstance(each, logging.Logger)))
