"""One log line for each fact that people should know of, on logger ``flask_socketio_guard``."""

from __future__ import annotations

import logging

from . import signals
from .signals import (
    BrokerChange,
    CallbackLoss,
    Failure,
    ListenerChange,
    OutboxLoss,
    Rejection,
    TaskChange,
    logger,
)
from .states import ListenerState, TaskState


class LogLines:
    """Writes the log of one application.

    Args:
        sender: The application whose signals are logged.
    """

    def __init__(self, sender: object) -> None:
        self._subscriptions = [
            signals.subscribe(signals.failed, sender, self._failed),
            signals.subscribe(signals.rejected, sender, self._rejected),
            signals.subscribe(signals.callback_lost, sender, self._callback_lost),
            signals.subscribe(signals.listener_changed, sender, self._listener_changed),
            signals.subscribe(signals.broker_changed, sender, self._broker_changed),
            signals.subscribe(signals.outbox_lost, sender, self._outbox_lost),
            signals.subscribe(signals.task_changed, sender, self._task_changed),
        ]

    def _failed(self, record: Failure) -> None:
        exc = record.exception
        where = f" [{record.namespace}]" if record.namespace else ""
        logger.error(
            "%s %r%s failed with %s, error id %s",
            record.kind,
            record.name,
            where,
            type(exc).__name__,
            record.error_id,
            exc_info=(type(exc), exc, exc.__traceback__),
            extra={
                "error_id": record.error_id,
                "kind": record.kind,
                "event": record.name,
                "namespace": record.namespace,
                "sid": record.sid,
            },
        )

    def _rejected(self, record: Rejection) -> None:
        logger.debug(
            "event %r [%s] rejected: %s",
            record.event,
            record.namespace,
            record.error.code,
            extra={"event": record.event, "namespace": record.namespace, "sid": record.sid},
        )

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
        reason = f": {record.reason}" if record.reason else ""
        logger.log(
            level,
            "message-queue listener: %s, was %s%s",
            record.new,
            record.old,
            reason,
            extra={"state": str(record.new), "reason": record.reason},
        )

    def _broker_changed(self, record: BrokerChange) -> None:
        if record.is_reachable:
            logger.warning(
                "the message queue answers again after %.2f s",
                record.duration,
                extra={"duration": record.duration},
            )
        else:
            logger.warning(
                "the message queue does not answer: %s",
                record.reason,
                extra={"reason": record.reason},
            )

    def _outbox_lost(self, record: OutboxLoss) -> None:
        detail = f" ({record.detail})" if record.detail else ""
        logger.error(
            "%d message(s) to other processes dropped: %s%s",
            record.count,
            record.reason,
            detail,
            extra={"count": record.count, "reason": record.reason},
        )

    def _task_changed(self, record: TaskChange) -> None:
        level = logging.ERROR if record.new is TaskState.FAILED else logging.DEBUG
        reason = f" ({record.reason})" if record.reason else ""
        logger.log(
            level,
            "task %r: %s, was %s%s",
            record.name,
            record.new,
            record.old,
            reason,
            extra={"task": record.name, "state": str(record.new)},
        )
