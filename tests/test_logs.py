"""One log line for each fact that people should know of."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import pytest

from flask_socketio_guard import signals
from flask_socketio_guard.errors import EventInvalid
from flask_socketio_guard.logs import LogLines
from flask_socketio_guard.signals import (
    BrokerChange,
    CallbackLoss,
    Failure,
    ListenerChange,
    OutboxLoss,
    Rejection,
    TaskChange,
)
from flask_socketio_guard.states import ListenerState, TaskState

if TYPE_CHECKING:
    from collections.abc import Callable

    from blinker import NamedSignal


class Sender:
    """An application."""


L, T = ListenerState, TaskState


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[NamedSignal, object], logging.LogRecord]:
    """Return a function that sends a record and returns the one line that was logged for it."""
    sender = Sender()
    lines = LogLines(sender)
    caplog.set_level(logging.DEBUG, "flask_socketio_guard")

    def send(signal: NamedSignal, record: object) -> logging.LogRecord:
        assert lines is not None
        caplog.clear()
        signals.send(signal, sender, record)
        signals.send(signal, Sender(), record)
        (line,) = caplog.records
        assert line.name == "flask_socketio_guard"
        return line

    return send


def _raised() -> RuntimeError:
    try:
        raise RuntimeError("secret of the application")
    except RuntimeError as exc:
        return exc


def test_a_failure_is_one_error_with_traceback_and_id(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
) -> None:
    failure = Failure("handler", _raised(), "chat", "/room", "sid-1")
    line = logged(signals.failed, failure)
    assert line.levelno == logging.ERROR
    assert line.getMessage() == (
        f"handler 'chat' [/room] failed with RuntimeError, error id {failure.error_id}"
    )
    assert line.exc_info is not None
    assert line.exc_info[1] is failure.exception
    assert line.exc_info[2] is not None
    assert line.error_id == failure.error_id  # type: ignore[attr-defined]
    assert (line.kind, line.event, line.namespace, line.sid) == (  # type: ignore[attr-defined]
        "handler",
        "chat",
        "/room",
        "sid-1",
    )


def test_a_failure_without_a_namespace_names_none(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
) -> None:
    failure = Failure("task", _raised(), "ticker")
    assert logged(signals.failed, failure).getMessage() == (
        f"task 'ticker' failed with RuntimeError, error id {failure.error_id}"
    )


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        (
            ListenerChange(L.IDLE, L.STARTING, ""),
            logging.INFO,
            "message-queue listener: starting, was idle",
        ),
        (
            ListenerChange(L.STARTING, L.RUNNING, ""),
            logging.INFO,
            "message-queue listener: running, was starting",
        ),
        (
            ListenerChange(L.RUNNING, L.STALLED, "a probe is overdue"),
            logging.ERROR,
            "message-queue listener: stalled, was running: a probe is overdue",
        ),
        (
            ListenerChange(L.RECONNECTING, L.STALLED, ""),
            logging.ERROR,
            "message-queue listener: stalled, was reconnecting",
        ),
        (
            ListenerChange(L.STALLED, L.RUNNING, ""),
            logging.WARNING,
            "message-queue listener: running, was stalled",
        ),
        (
            ListenerChange(L.RUNNING, L.RECONNECTING, "refused"),
            logging.DEBUG,
            "message-queue listener: reconnecting, was running: refused",
        ),
        (
            ListenerChange(L.RECONNECTING, L.RUNNING, ""),
            logging.DEBUG,
            "message-queue listener: running, was reconnecting",
        ),
        (
            ListenerChange(L.RUNNING, L.STOPPED, ""),
            logging.INFO,
            "message-queue listener: stopped, was running",
        ),
    ],
    ids=lambda value: f"{value.old}-{value.new}" if isinstance(value, ListenerChange) else "",
)
def test_a_change_of_the_listener_is_as_loud_as_it_is_bad(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
    change: ListenerChange,
    level: int,
    text: str,
) -> None:
    """The broker's going and coming has lines of its own."""
    line = logged(signals.listener_changed, change)
    assert (line.levelno, line.getMessage()) == (level, text)


def test_a_broker_has_one_line_on_the_way_down_and_one_on_the_way_up(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
) -> None:
    down = logged(signals.broker_changed, BrokerChange(False, "Connection refused"))
    assert down.levelno == logging.WARNING
    assert down.getMessage() == "the message queue does not answer: Connection refused"
    up = logged(signals.broker_changed, BrokerChange(True, "", 12.345))
    assert up.levelno == logging.WARNING
    assert up.getMessage() == "the message queue answers again after 12.35 s"


def test_lost_messages_are_an_error_with_their_number(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
) -> None:
    line = logged(signals.outbox_lost, OutboxLoss(3, "overflow"))
    assert line.levelno == logging.ERROR
    assert line.getMessage() == "3 message(s) to other processes dropped: overflow"
    line = logged(signals.outbox_lost, OutboxLoss(1, "refused", "NOPERM"))
    assert line.getMessage() == "1 message(s) to other processes dropped: refused (NOPERM)"


def test_what_clients_cause_is_for_debugging_only(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
) -> None:
    """Else any client could fill the log."""
    rejection = Rejection("connect", "/", "sid-1", EventInvalid(code="reserved_event"))
    line = logged(signals.rejected, rejection)
    assert line.levelno == logging.DEBUG
    assert line.getMessage() == "event 'connect' [/] rejected: reserved_event"
    line = logged(signals.callback_lost, CallbackLoss("gone", "sid-1"))
    assert line.levelno == logging.DEBUG
    assert line.getMessage() == "an acknowledgement callback was dropped: gone"


def test_what_a_client_sends_cannot_forge_a_log_line(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
) -> None:
    rejection = Rejection("x\nERROR all is lost", "/", None, EventInvalid())
    assert "\n" not in logged(signals.rejected, rejection).getMessage()


@pytest.mark.parametrize(
    ("new", "level"),
    [
        (T.FAILED, logging.ERROR),
        (T.BACKING_OFF, logging.DEBUG),
        (T.RUNNING, logging.DEBUG),
        (T.STOPPED, logging.DEBUG),
    ],
    ids=str,
)
def test_a_task_that_failed_for_good_is_an_error(
    logged: Callable[[NamedSignal, object], logging.LogRecord], new: TaskState, level: int
) -> None:
    line = logged(signals.task_changed, TaskChange("ticker", T.RUNNING, new, "RuntimeError"))
    assert line.levelno == level
    assert line.getMessage() == f"task 'ticker': {new}, was running (RuntimeError)"


def test_a_discarded_log_writes_no_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "flask_socketio_guard")
    sender = Sender()
    lines = LogLines(sender)
    del lines
    gc.collect()
    signals.send(signals.outbox_lost, sender, OutboxLoss(1, "overflow"))
    assert caplog.records == []
