"""One log line for each fact that people should know of, on logger ``flask_socketio_guard``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..core.component import Component
from ..states import DeliveryState, ListenerState, TaskState
from . import records as signals
from .log_deduplication import Line, LogDeduplicator, LoggerDeduplication, tell
from .printable import printable, printable_traceback, without_secrets
from .records import (
    BrokerChange,
    CallbackLoss,
    ConnectionChange,
    DeliveryEnd,
    DeliveryLoss,
    Failure,
    HandshakeRefusal,
    ListenerChange,
    LoopBlock,
    OutboxLoss,
    Rejection,
    Repetition,
    SendLoss,
    Sweep,
    TaskChange,
    Violation,
    logger,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

_LONGEST_NAME = 100  # characters of what a client may have sent
_LONGEST_DETAIL = 200
_LONGEST_STACK = 10_000
_FAILURE_BURST = 20  # failures at one place and in one fold interval that are written in full
_BROKER_BURST = 5  # outages in one fold interval that are each worth their two lines

_LIMIT_CODES = ("rate_limited", "too_many_in_flight")
_DEATHS = {
    DeliveryState.EXPIRED: "expired",
    DeliveryState.GONE: "was for a connection that is gone",
    DeliveryState.REFUSED: "was refused by its recipient",
}
_REFUSAL_LEVELS = {
    "full": logging.WARNING,
    "address": logging.WARNING,
    "rate": logging.WARNING,
    "origin": logging.WARNING,
    "version": logging.WARNING,
    "elsewhere": logging.WARNING,
    "unjoined": logging.WARNING,
    "application": logging.INFO,
    "draining": logging.INFO,
}
"""Clients that come with an old session or half a request are for debugging only."""


class LogLines(Component):
    """Writes the log of one application.

    Repeats of one warning are folded: counted, and told in one line. So are failures
    at one place in the code, once the first of an interval are written with traceback
    and error id; each is still told to the subscribers of ``signals.failed``.

    Args:
        sender: The application whose signals are logged.
        fold_interval: Seconds for which repeats are kept back, > 0.
        loggers: Those of the packages underneath, whose repeats are folded, too,
            for as long as this object lives; what is no logger of the standard
            library is left alone.
        count: Called as ``count("log_lines_folded", 1)`` for each line kept back.
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
            signals.subscribe(signals.failed, sender, self._failed),
            signals.subscribe(signals.rejected, sender, self._rejected),
            signals.subscribe(signals.callback_lost, sender, self._callback_lost),
            signals.subscribe(signals.listener_changed, sender, self._listener_changed),
            signals.subscribe(signals.broker_changed, sender, self._broker_changed),
            signals.subscribe(signals.outbox_lost, sender, self._outbox_lost),
            signals.subscribe(signals.task_changed, sender, self._task_changed),
            signals.subscribe(signals.connection_changed, sender, self._connection_changed),
            signals.subscribe(signals.handshake_refused, sender, self._handshake_refused),
            signals.subscribe(signals.protocol_violated, sender, self._protocol_violated),
            signals.subscribe(signals.send_lost, sender, self._send_lost),
            signals.subscribe(signals.message_repeated, sender, self._message_repeated),
            signals.subscribe(signals.connections_swept, sender, self._connections_swept),
            signals.subscribe(signals.delivery_ended, sender, self._delivery_ended),
            signals.subscribe(signals.delivery_store_changed, sender, self._store_changed),
            signals.subscribe(signals.deliveries_abandoned, sender, self._deliveries_abandoned),
            signals.subscribe(signals.loop_blocked, sender, self._loop_blocked),
        ]

    def tick(self) -> None:
        """Tell of repeats that are due; called every tick."""
        tell(self.folder.due())
        for fold in self._logger_folds:
            fold.tick()

    def stop(self, timeout: float) -> None:
        """Tell of all repeats, and let go of the loggers; there are no more ticks.

        What is logged from then on is folded all the same, and told with the next of its class.
        """
        del timeout
        tell(self.folder.flush())
        for fold in self._logger_folds:
            fold.flush()
        self._logger_folds.clear()

    def _fold(
        self,
        key: Hashable,
        level: int,
        repeated: str,
        message: str,
        *args: object,
        count: int = 1,
        burst: int = 1,
        extra: Mapping[str, object] | None = None,
        exc_info: BaseException | None = None,
    ) -> None:
        """Write a line, or count it if its class has been told of lately.

        Args:
            key: Its class.
            level: Of the line and of that which tells of repeats.
            repeated: What repeats are told with.
            message: As for ``logger.log``.
            args: As for ``logger.log``.
            count: How many things the line tells of.
            burst: How many such lines are written in one interval.
            extra: As for ``logger.log``.
            exc_info: As for ``logger.log``.
        """
        if not logger.isEnabledFor(level):
            return
        tell(self.folder.due())  # a write-only process does not tick
        if self.folder.admit(key, Line(logger, level, repeated), count=count, burst=burst):
            logger.log(level, message, *args, exc_info=exc_info, extra=extra, stacklevel=2)
        else:
            self._on_folded()

    def _failed(self, record: Failure) -> None:
        exc = record.exception
        where = f" [{_printable(record.namespace)}]" if record.namespace else ""
        place = _place(exc)
        self._fold(
            ("failed", record.kind, place, type(exc)),
            logging.ERROR,
            f"{record.kind} failed with {type(exc).__name__} at {place}",
            "%s %r%s failed with %s, error id %s",
            record.kind,
            record.name[:_LONGEST_NAME],
            where,
            type(exc).__name__,
            record.error_id,
            burst=_FAILURE_BURST,
            exc_info=exc,
            extra={
                "error_id": record.error_id,
                "kind": record.kind,
                "event": _printable(record.name),
                "namespace": record.namespace and _printable(record.namespace),
                "sid": record.sid,
            },
        )

    def _rejected(self, record: Rejection) -> None:
        code = _printable(str(record.error.code))
        message = "event %r [%s] rejected: %s"
        arguments: tuple[object, ...] = (
            record.event[:_LONGEST_NAME],
            _printable(record.namespace),
            code,
        )
        extra = {
            "event": _printable(record.event),
            "namespace": _printable(record.namespace),
            "sid": record.sid,
        }
        if code in _LIMIT_CODES:
            key, repeated = ("rejected", code), f"events rejected: {code}"
            self._fold(key, logging.WARNING, repeated, message, *arguments, extra=extra)
        else:
            if record.error_id:
                message += ", but answered by the application, error id %s"
                arguments += (record.error_id,)
            logger.debug(message, *arguments, extra=extra, exc_info=record.exception)

    def _callback_lost(self, record: CallbackLoss) -> None:
        logger.debug("an acknowledgement callback was dropped: %s", record.reason)

    def _listener_changed(self, record: ListenerChange) -> None:
        level = logging.INFO
        if record.new is ListenerState.STALLED:
            level = logging.ERROR
        elif record.old is ListenerState.STALLED:
            level = logging.WARNING
        elif ListenerState.RECONNECTING in (record.old, record.new):
            level = logging.DEBUG  # the broker's going and coming has lines of its own
        reason = _printable(without_secrets(record.reason))
        logger.log(
            level,
            "message-queue listener: %s, was %s%s",
            record.new,
            record.old,
            f": {reason}" if reason else "",
            extra={"state": str(record.new), "reason": reason},
        )

    def _broker_changed(self, record: BrokerChange) -> None:
        self._server_changed("the message queue", record)

    def _store_changed(self, record: BrokerChange) -> None:
        self._server_changed("the store of messages that must arrive", record)

    def _server_changed(self, server: str, record: BrokerChange) -> None:
        # Not folded before it flutters: the last line must be what is true now.
        if record.is_reachable:
            self._fold(
                (server, True),
                logging.WARNING,
                f"{server} answers again",
                f"{server} answers again after %.2f s",
                record.duration,
                burst=_BROKER_BURST,
                extra={"duration": record.duration},
            )
        else:
            did = "refuses this process" if record.is_refusing else "does not answer"
            self._fold(
                (server, did),
                logging.ERROR if record.is_refusing else logging.WARNING,
                f"{server} {did}",
                f"{server} {did}: %s",
                _printable(without_secrets(record.reason)),
                burst=_BROKER_BURST,
                extra={"reason": _printable(without_secrets(record.reason))},
            )

    def _outbox_lost(self, record: OutboxLoss) -> None:
        self._fold(
            ("outbox", record.reason),
            logging.ERROR,
            f"message(s) to other processes dropped: {record.reason}",
            "%d message(s) to other processes dropped: %s%s",
            record.count,
            record.reason,
            _in_brackets(record.detail),
            count=record.count,
            extra={"count": record.count, "reason": record.reason},
        )

    def _task_changed(self, record: TaskChange) -> None:
        level = logging.ERROR if record.new is TaskState.FAILED else logging.DEBUG
        logger.log(
            level,
            "task %r: %s, was %s%s",
            record.name,
            record.new,
            record.old,
            _in_brackets(without_secrets(record.reason)),
            extra={"task": record.name, "state": str(record.new)},
        )

    def _connection_changed(self, record: ConnectionChange) -> None:
        if not logger.isEnabledFor(logging.DEBUG):
            return  # there are four of these for every client
        logger.debug(
            "connection [%s]: %s%s%s",
            _printable(record.namespace),
            record.new,
            "" if record.old is None else f", was {record.old}",
            _in_brackets(record.reason),
            extra={
                "sid": record.sid,
                "namespace": _printable(record.namespace),
                "state": str(record.new),
                "reason": record.reason,
            },
        )

    def _handshake_refused(self, record: HandshakeRefusal) -> None:
        level = _REFUSAL_LEVELS.get(record.reason, logging.DEBUG)
        message, extra = "a client was not let in: %s%s", {"reason": record.reason}
        detail = _in_brackets(record.detail)
        if level == logging.DEBUG:
            logger.debug(message, record.reason, detail, extra=extra)
        else:
            key, repeated = ("refused", record.reason), f"clients not let in: {record.reason}"
            self._fold(key, level, repeated, message, record.reason, detail, extra=extra)

    def _protocol_violated(self, record: Violation) -> None:
        self._fold(
            ("violated", record.reason),
            logging.WARNING,
            f"clients broke the protocol: {record.reason}",
            "a client broke the protocol and was closed: %s%s",
            record.reason,
            _in_brackets(record.detail),
            extra={"reason": record.reason},
        )

    def _message_repeated(self, record: Repetition) -> None:
        self._fold(
            ("repeated",),
            logging.INFO,
            "messages of other processes came again and were dropped",
            "a message of another process came again and was dropped: number %d of %s",
            record.sequence,
            _printable(record.host_id),
            extra={"sequence": record.sequence, "host_id": _printable(record.host_id)},
        )

    def _send_lost(self, record: SendLoss) -> None:
        message = "%d message(s) to a client dropped: %s"
        extra = {"count": record.count, "reason": record.reason}
        if record.reason == "slow":
            self._fold(
                ("send", record.reason),
                logging.WARNING,
                f"message(s) to clients dropped: {record.reason}",
                message,
                record.count,
                record.reason,
                count=record.count,
                extra=extra,
            )
        else:
            logger.debug(message, record.count, record.reason, extra=extra)

    def _connections_swept(self, record: Sweep) -> None:
        self._fold(
            "swept",
            logging.WARNING,
            "leftover(s) of connections removed",
            "%d leftover(s) of connections removed from %s",
            record.count,
            ", ".join(record.tables),
            count=record.count,
            extra={"count": record.count, "tables": record.tables},
        )

    def _deliveries_abandoned(self, record: DeliveryLoss) -> None:
        logger.warning(
            "%d messages that must arrive were still in the memory of this process", record.count
        )

    def _delivery_ended(self, record: DeliveryEnd) -> None:
        if record.state not in _DEATHS:
            return
        self._fold(
            ("delivery", record.state),
            logging.WARNING,
            f"messages that must arrive: {_DEATHS[record.state]}",
            "a message that must arrive (%s, %s) %s, after %d attempt(s)",
            record.id,
            repr(record.event)[:_LONGEST_NAME],
            _DEATHS[record.state],
            record.attempts,
            extra={"delivery_id": record.id, "state": str(record.state)},
        )

    def _loop_blocked(self, record: LoopBlock) -> None:
        extra = {"place": record.place, "duration": record.duration}
        if record.duration is None:
            self._fold(
                ("blocked", record.place),
                logging.WARNING,
                f"the event loop is blocked at {record.place}",
                "the event loop is blocked at %s\n%s",
                record.place,
                record.stack[-_LONGEST_STACK:].rstrip("\n"),
                extra=extra,
            )
        else:
            self._fold(
                ("unblocked", record.place),
                logging.WARNING,
                f"the event loop was blocked at {record.place}",
                "the event loop was blocked for %.2f s at %s",
                record.duration,
                record.place,
                extra=extra,
            )


class _Printable(logging.Filter):
    """Makes whatever the guard logs safe to write, whoever asks for it."""

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


for _each in (logger, logger.getChild("websocket")):  # filters are not those of children, too
    _each.addFilter(_Printable())


def _printable(text: str) -> str:
    return printable(text, _LONGEST_DETAIL)


def _place(exc: BaseException) -> str:
    """Return file, line and function where *exc* was raised."""
    tb = exc.__traceback__
    if tb is None:
        return "an unknown place"
    while tb.tb_next is not None:
        tb = tb.tb_next
    code = tb.tb_frame.f_code
    return f"{code.co_filename}:{tb.tb_lineno} in {code.co_name}"


def _in_brackets(text: str) -> str:
    return f" ({_printable(text)})" if text else ""


def _unwrapped(loggers: Iterable[object]) -> list[logging.Logger]:
    """Return the loggers of the standard library among *loggers*, each once."""
    found = [each.logger if isinstance(each, logging.LoggerAdapter) else each for each in loggers]
    return list(dict.fromkeys(each for each in found if isinstance(each, logging.Logger)))
