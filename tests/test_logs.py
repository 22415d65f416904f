"""One log line for each fact that people should know of."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.errors import EventInvalid, EventRejected, RateLimited
from flask_socketio_guard.states import ConnectionState, ListenerState, TaskState
from flask_socketio_guard.telemetry import log_deduplication as folding
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.telemetry.counters import Counters
from flask_socketio_guard.telemetry.log_deduplication import LogDeduplicator
from flask_socketio_guard.telemetry.logs import LogLines
from flask_socketio_guard.telemetry.records import (
    BrokerChange,
    CallbackLoss,
    ConnectionChange,
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
)
from tests.support.unit_support import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from blinker import NamedSignal


class Sender:
    """An application."""


C, L, T = ConnectionState, ListenerState, TaskState
SID = "sid-of-a-client"
INTERVAL = 60.0
DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


def named(value: object) -> str:
    """Name a parameter; what differs from process to process (an address) must not be in it."""
    return str(getattr(value, "name", value))


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
    ids=named,
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


def test_a_discarded_log_lets_go_of_the_loggers() -> None:
    logger = logging.getLogger("engineio.tests")
    lines = LogLines(Sender(), loggers=[logger])
    assert len(logger.filters) == 1
    del lines
    gc.collect()
    assert logger.filters == []


# What happens to clients


@pytest.mark.parametrize(
    ("signal", "record", "level", "text"),
    [
        (
            signals.connection_changed,
            ConnectionChange(SID, "/", None, C.CONNECTING),
            DEBUG,
            "connection [/]: connecting",
        ),
        (
            signals.connection_changed,
            ConnectionChange(SID, "/room", C.CONNECTING, C.OPEN),
            DEBUG,
            "connection [/room]: open, was connecting",
        ),
        (
            signals.connection_changed,
            ConnectionChange(SID, "/", C.OPEN, C.CLOSING, "ping timeout"),
            DEBUG,
            "connection [/]: closing, was open (ping timeout)",
        ),
        *(
            (
                signals.handshake_refused,
                HandshakeRefusal(reason),
                level,
                f"a client was not let in: {reason}",
            )
            for level, reasons in (
                (DEBUG, ("session", "upgrade", "request")),
                (INFO, ("draining",)),
                (WARNING, ("full", "address", "rate", "origin", "version")),
            )
            for reason in reasons
        ),
        (
            signals.handshake_refused,
            HandshakeRefusal("upgrade", "no key"),
            DEBUG,
            "a client was not let in: upgrade (no key)",
        ),
        (
            signals.handshake_refused,
            HandshakeRefusal("full", "100 are here"),
            WARNING,
            "a client was not let in: full (100 are here)",
        ),
        (
            signals.protocol_violated,
            Violation("packet"),
            WARNING,
            "a client broke the protocol and was closed: packet",
        ),
        (
            signals.protocol_violated,
            Violation("size", "10 MB"),
            WARNING,
            "a client broke the protocol and was closed: size (10 MB)",
        ),
        (
            signals.send_lost,
            SendLoss(7, "slow"),
            WARNING,
            "7 message(s) to a client dropped: slow",
        ),
        *(
            (
                signals.send_lost,
                SendLoss(1, reason),
                DEBUG,
                f"1 message(s) to a client dropped: {reason}",
            )
            for reason in ("volatile", "closed")
        ),
        (
            signals.message_repeated,
            Repetition("x\n", 7),
            INFO,
            "a duplicate message of another process was dropped: number 7 of x\\n",
        ),
        (
            signals.connections_swept,
            Sweep(3, ("rooms", "sockets")),
            WARNING,
            "3 leftover(s) of connections removed from rooms, sockets",
        ),
        (
            signals.loop_blocked,
            LoopBlock("app.py:7 in nap", "a\nb\n"),
            WARNING,
            "the event loop is blocked at app.py:7 in nap\na\nb",
        ),
        (
            signals.loop_blocked,
            LoopBlock("app.py:7 in nap", "a\nb\n", 1.234),
            WARNING,
            "the event loop was blocked for 1.23 s at app.py:7 in nap",
        ),
        (
            signals.rejected,
            Rejection("chat", "/", SID, RateLimited()),
            WARNING,
            "event 'chat' [/] rejected: rate_limited",
        ),
        (
            signals.rejected,
            Rejection("chat", "/", SID, EventRejected()),
            DEBUG,
            "event 'chat' [/] rejected: rejected",
        ),
    ],
    ids=named,
)
def test_what_happens_to_clients_is_as_loud_as_it_is_bad(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
    signal: NamedSignal,
    record: object,
    level: int,
    text: str,
) -> None:
    """And no line names a client."""
    line = logged(signal, record)
    assert (line.levelno, line.getMessage()) == (level, text)
    assert SID not in line.getMessage()


def test_facts_are_there_for_machines(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
) -> None:
    def extra(signal: NamedSignal, record: object, *names: str) -> list[Any]:
        line = logged(signal, record)
        return [getattr(line, name) for name in names]

    change = ConnectionChange(SID, "/room", C.OPEN, C.CLOSING, "ping timeout")
    assert extra(signals.connection_changed, change, "sid", "namespace") == [SID, "/room"]
    assert extra(signals.connection_changed, change, "state") == ["closing"]
    assert extra(signals.connection_changed, change, "reason") == ["ping timeout"]
    for error in (RateLimited(), EventRejected()):
        rejection = Rejection("chat", "/room", SID, error)
        facts = extra(signals.rejected, rejection, "sid", "namespace", "event")
        assert facts == [SID, "/room", "chat"]
    assert extra(signals.handshake_refused, HandshakeRefusal("full"), "reason") == ["full"]
    assert extra(signals.protocol_violated, Violation("size"), "reason") == ["size"]
    assert extra(signals.send_lost, SendLoss(2, "slow"), "count", "reason") == [2, "slow"]
    assert extra(signals.send_lost, SendLoss(2, "closed"), "count", "reason") == [2, "closed"]
    assert extra(signals.connections_swept, Sweep(2, ("a",)), "count", "tables") == [2, ("a",)]
    block = LoopBlock("app.py:7 in nap", "", 1.5)
    assert extra(signals.loop_blocked, block, "place", "duration") == ["app.py:7 in nap", 1.5]
    assert extra(signals.outbox_lost, OutboxLoss(2, "x"), "count", "reason") == [2, "x"]
    assert extra(signals.broker_changed, BrokerChange(False, "gone"), "reason") == ["gone"]
    assert extra(signals.broker_changed, BrokerChange(True, "", 2.5), "duration") == [2.5]


FORGED = "x\nERROR all is lost \x1b[2J" + 10_000 * "!"


@pytest.mark.parametrize(
    ("signal", "record"),
    [
        (signals.failed, Failure("handler", RuntimeError(), FORGED, FORGED, SID)),
        (signals.rejected, Rejection(FORGED, FORGED, SID, EventRejected(code=FORGED))),
        (signals.rejected, Rejection(FORGED, FORGED, SID, RateLimited())),
        (signals.connection_changed, ConnectionChange(SID, FORGED, None, C.CLOSED, FORGED)),
        (signals.handshake_refused, HandshakeRefusal("full", FORGED)),
        (signals.protocol_violated, Violation("packet", FORGED)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_a_client_sends_forges_or_fills_a_line(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
    signal: NamedSignal,
    record: object,
) -> None:
    """A handler for any event, or for any namespace, is asked under names that clients choose."""
    text = logged(signal, record).getMessage()
    assert text.isprintable()
    assert len(text) < 800


def test_a_deep_stack_is_told_by_its_end(
    logged: Callable[[NamedSignal, object], logging.LogRecord],
) -> None:
    block = LoopBlock("app.py:7 in nap", 100_000 * "x" + "the guilty line")
    text = logged(signals.loop_blocked, block).getMessage()
    assert text.endswith("the guilty line")
    assert len(text) < 11_000


def test_changes_of_connections_cost_nothing_when_nobody_reads_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Unseen:
        def __str__(self) -> str:
            raise AssertionError("formatted for nobody")

    sender = Sender()
    lines = LogLines(sender)
    caplog.set_level(INFO, "flask_socketio_guard")
    unseen: Any = Unseen()
    signals.send(signals.connection_changed, sender, ConnectionChange(SID, unseen, None, unseen))
    assert caplog.records == []
    del lines


# Repeats


class Log:
    """The lines of one application, on a clock of their own, and what they count."""

    def __init__(self, caplog: pytest.LogCaptureFixture, **options: Any) -> None:
        self.caplog = caplog
        self.sender = Sender()
        self.counters = Counters(self.sender)
        self.clock = FakeClock()
        self.lines = LogLines(
            self.sender, fold_interval=INTERVAL, count=self.counters.add, **options
        )
        self.lines.folder = LogDeduplicator(INTERVAL, clock=self.clock)

    def send(self, signal: NamedSignal, *records: object) -> list[str]:
        """Return what was written for them."""
        self.caplog.clear()
        for record in records:
            signals.send(signal, self.sender, record)
        return self.texts

    def tick(self, after: float) -> list[str]:
        """Return what is told when so much time has passed."""
        self.caplog.clear()
        self.clock.advance(after)
        self.lines.tick()
        return self.texts

    @property
    def texts(self) -> list[str]:
        return [line.getMessage() for line in self.caplog.records]

    @property
    def counted(self) -> int:
        return self.counters.as_dict()["log_lines_folded"]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.INFO)
    return Log(caplog)


@pytest.mark.parametrize(
    ("signal", "record", "other", "key", "level", "told"),
    [
        (
            signals.handshake_refused,
            HandshakeRefusal("full"),
            HandshakeRefusal("rate"),
            ("refused", "full"),
            WARNING,
            "clients not let in: full ... 412 more in 60 s",
        ),
        (
            signals.handshake_refused,
            HandshakeRefusal("draining"),
            HandshakeRefusal("rate"),
            ("refused", "draining"),
            INFO,
            "clients not let in: draining ... 412 more in 60 s",
        ),
        (
            signals.protocol_violated,
            Violation("packet", "some detail"),
            Violation("size"),
            ("violated", "packet"),
            WARNING,
            "clients broke the protocol: packet ... 412 more in 60 s",
        ),
        (
            signals.send_lost,
            SendLoss(2, "slow"),
            SendLoss(2, "closed"),
            ("send", "slow"),
            WARNING,
            "message(s) to clients dropped: slow ... 824 more in 60 s",
        ),
        (
            signals.connections_swept,
            Sweep(3, ("rooms",)),
            None,
            "swept",
            WARNING,
            "leftover(s) of connections removed ... 1236 more in 60 s",
        ),
        (
            signals.loop_blocked,
            LoopBlock("app.py:7 in nap", "stack"),
            LoopBlock("app.py:7 in nap", "stack", 1.0),
            ("blocked", "app.py:7 in nap"),
            WARNING,
            "the event loop is blocked at app.py:7 in nap ... 412 more in 60 s",
        ),
        (
            signals.loop_blocked,
            LoopBlock("app.py:7 in nap", "stack", 2.0),
            LoopBlock("app.py:8 in nap", "stack", 2.0),
            ("unblocked", "app.py:7 in nap"),
            WARNING,
            "the event loop was blocked at app.py:7 in nap ... 412 more in 60 s",
        ),
        (
            signals.rejected,
            Rejection("chat", "/", SID, RateLimited()),
            Rejection("chat", "/", SID, EventRejected()),
            ("rejected", "rate_limited"),
            WARNING,
            "events rejected: rate_limited ... 412 more in 60 s",
        ),
        (
            signals.outbox_lost,
            OutboxLoss(5, "overflow"),
            OutboxLoss(5, "refused"),
            ("outbox", "overflow"),
            ERROR,
            "message(s) to other processes dropped: overflow ... 2060 more in 60 s",
        ),
    ],
    ids=named,
)
def test_repeats_of_one_warning_are_told_in_one_line(
    log: Log,
    signal: NamedSignal,
    record: object,
    other: object,
    key: Hashable,
    level: int,
    told: str,
) -> None:
    """Each kept-back line is counted, and another class has lines of its own."""
    assert len(log.send(signal, *[record] * 413)) == 1
    assert log.counted == 412
    assert log.lines.folder.counts == {key: 412}
    log.caplog.set_level(logging.DEBUG)
    if other is not None:
        assert len(log.send(signal, other)) == 1
    assert log.tick(INTERVAL) == [told]
    (line,) = log.caplog.records
    assert (line.name, line.levelno) == ("flask_socketio_guard", level)
    assert SID not in told


def test_who_asks_too_much_under_many_names_is_one_class(log: Log) -> None:
    records = [Rejection(f"event {n}", f"/{n}", str(n), RateLimited()) for n in range(100)]
    assert len(log.send(signals.rejected, *records)) == 1


def test_failures_at_one_place_are_folded_after_the_first(log: Log) -> None:
    """A client chooses how often a handler fails; another place has lines of its own."""
    failures = [Failure("handler", _raised(), f"chat {n}", "/", SID) for n in range(500)]
    assert len(log.send(signals.failed, *failures)) == 20
    assert log.counted == 480
    assert len(log.send(signals.failed, Failure("handler", KeyError(), "chat"))) == 1
    (told,) = log.tick(INTERVAL)
    assert "handler failed with RuntimeError at" in told
    assert told.endswith("in _raised ... 480 more in 60 s")


@pytest.mark.parametrize(
    "text",
    ["x\nERROR forged \x1b[2J", "\ud800", 100_000 * "\x00"],
    ids=["lines", "surrogate", "long"],
)
def test_the_text_of_an_exception_is_escaped_and_cut(log: Log, text: str) -> None:
    """A lone surrogate would make handlers lose the record whose id the client was told."""
    failure = Failure("handler", RuntimeError(text), text, text, SID)
    failure.exception.__cause__ = ValueError(text)
    log.send(signals.failed, failure)
    (record,) = log.caplog.records
    written = logging.Formatter().format(record)
    assert written.encode()
    assert "\x1b" not in written
    assert "\nERROR" not in written
    assert "\x00" not in written
    assert len(written) < 6_000
    assert "RuntimeError" in written
    assert "ValueError" in written
    assert str(vars(record)["event"]).isprintable()
    assert str(vars(record)["namespace"]).isprintable()


def test_a_reason_of_the_broker_is_escaped_and_holds_no_password(log: Log) -> None:
    reason = "x://:hunter2#x@host\n\x1b[2J\ud800"
    (line,) = log.send(signals.broker_changed, BrokerChange(False, reason))
    assert line.isprintable()
    assert "hunter2" not in line
    assert "hunter2" not in str(vars(log.caplog.records[0])["reason"])


def test_a_reason_of_listener_and_tasks_is_escaped_and_holds_no_password(log: Log) -> None:
    reason = "x://:hunter2#x@host\n\x1b[2J\ud800"
    log.send(signals.listener_changed, ListenerChange(L.RUNNING, L.STALLED, reason))
    log.send(signals.task_changed, TaskChange("ticker", T.RUNNING, T.FAILED, reason))
    for record in log.caplog.records:
        assert record.getMessage().isprintable()
        assert "hunter2" not in str(vars(record))


def test_what_is_logged_of_frames_is_escaped(log: Log) -> None:
    """On a logger of its own, which filters of its parent do not see."""
    try:
        raise ValueError("x\nforged \x1b[2J")
    except ValueError as exc:
        logging.getLogger("flask_socketio_guard.websocket").error("a frame: \ud800", exc_info=exc)
    (record,) = log.caplog.records
    written = logging.Formatter().format(record)
    assert written.encode()
    assert "\x1b" not in written


def test_changes_of_listener_and_tasks_are_never_folded(log: Log) -> None:
    """The last line must be the present state."""
    stalls = [
        ListenerChange(L.RUNNING, L.STALLED, "overdue"),
        ListenerChange(L.STALLED, L.RUNNING, ""),
    ]
    assert len(log.send(signals.listener_changed, *stalls * 10)) == 20
    failures = [TaskChange("ticker", T.RUNNING, T.FAILED, "RuntimeError")]
    assert len(log.send(signals.task_changed, *failures * 10)) == 10


def test_a_broker_that_flutters_is_told_of_at_first_and_then_folded(log: Log) -> None:
    outage = [BrokerChange(False, "refused"), BrokerChange(True, "", 0.5)]
    assert (
        log.send(signals.broker_changed, *outage * 5)
        == [
            "the message queue does not answer: refused",
            "the message queue answers again after 0.50 s",
        ]
        * 5
    )
    assert log.send(signals.broker_changed, *outage * 100) == []
    assert log.counted == 200
    assert log.tick(INTERVAL) == [
        "the message queue does not answer ... 100 more in 60 s",
        "the message queue answers again ... 100 more in 60 s",
    ]


def test_what_nobody_would_read_is_neither_folded_nor_counted(log: Log) -> None:
    log.caplog.set_level(logging.ERROR, "flask_socketio_guard")
    log.send(signals.protocol_violated, *[Violation("packet")] * 10)
    assert log.counted == 0
    log.caplog.set_level(logging.WARNING, "flask_socketio_guard")
    assert len(log.send(signals.protocol_violated, Violation("packet"))) == 1


def test_a_process_without_ticks_tells_with_its_next_line(log: Log) -> None:
    """One that only emits has none."""
    log.send(signals.outbox_lost, *[OutboxLoss(1, "overflow")] * 10)
    log.clock.advance(INTERVAL)
    assert log.send(signals.outbox_lost, OutboxLoss(1, "overflow"), OutboxLoss(1, "refused")) == [
        "message(s) to other processes dropped: overflow ... 9 more in 60 s",
        "1 message(s) to other processes dropped: refused",
    ]


def test_lines_need_nobody_who_counts(caplog: pytest.LogCaptureFixture) -> None:
    sender = Sender()
    lines = LogLines(sender)
    for _ in range(3):
        signals.send(signals.protocol_violated, sender, Violation("packet"))
    assert len(caplog.records) == 1
    assert lines.folder.counts == {("violated", "packet"): 2}


def test_two_applications_fold_for_themselves(caplog: pytest.LogCaptureFixture) -> None:
    logs = Log(caplog), Log(caplog)
    for _ in range(3):
        for log in logs:
            signals.send(signals.protocol_violated, log.sender, Violation("packet"))
    assert len(caplog.records) == 2
    assert [log.counted for log in logs] == [2, 2]


def test_a_line_is_said_to_come_from_where_the_fact_is_known(log: Log) -> None:
    log.send(signals.protocol_violated, Violation("packet"))
    assert log.caplog.records[0].module == "logs"


# The loggers of the packages underneath


def test_repeats_of_upstream_are_folded_and_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    folder = folding.LogDeduplicator
    monkeypatch.setattr(
        folding, "LogDeduplicator", lambda interval, **_: folder(interval, clock=clock)
    )
    logger = logging.getLogger("engineio.tests")
    log = Log(caplog, loggers=(logger, logger))
    assert len(logger.filters) == 1
    for _ in range(413):
        logger.warning("it rains")
    assert log.counted == 412
    clock.advance(INTERVAL)
    assert log.tick(0) == ["'it rains' ... 412 more in 60 s"]
    log.lines.stop(0.0)


def test_an_adapter_is_folded_by_its_logger_and_what_is_no_logger_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``SocketIO(logger=...)`` takes anything that has the methods."""

    class Structured:
        def warning(self, *args: object) -> None: ...

    logger = logging.getLogger("engineio.tests")
    loggers: Any = (logging.LoggerAdapter(logger, {}), Structured(), True, None)
    log = Log(caplog, loggers=loggers)
    assert len(logger.filters) == 1
    log.lines.stop(0.0)


def test_who_closes_tells_all_and_lets_go(caplog: pytest.LogCaptureFixture) -> None:
    """So that the last seconds of a process are not missing in its log."""
    logger = logging.getLogger("engineio.tests")
    log = Log(caplog, loggers=[logger])
    log.send(signals.protocol_violated, *[Violation("packet")] * 3)
    for _ in range(3):
        logger.warning("it rains")
    caplog.clear()
    log.clock.advance(5)
    log.lines.stop(0.0)
    assert log.texts == [
        "clients broke the protocol: packet ... 2 more in 5 s",
        "'it rains' ... 2 more in 1 s",
    ]
    assert logger.filters == []
    assert len(log.send(signals.protocol_violated, Violation("packet"))) == 1
    log.lines.stop(0.0)
    assert len(log.texts) == 1
