"""How each record is counted and told: the facts of the log and of the counters, one by one."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.errors import EventRejected, RateLimited
from flask_socketio_guard.states import ConnectionState, DeliveryState, ListenerState, TaskState
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.telemetry.counters import Counters
from flask_socketio_guard.telemetry.logs import LogLines
from flask_socketio_guard.telemetry.records import (
    LISTENER_TASK,
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
    StoreChange,
    Sweep,
    TaskChange,
    Violation,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FACTS = Path(__file__).with_name("telemetry_facts.json")
PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
NASTY = "a\nb \\ \ud800 redis://me:secret@host/0 " + "x" * 300


class Sender:
    """An application."""


def facts() -> Iterator[tuple[str, object]]:
    """Yield one record of every kind, with the name of its signal."""
    for kind in ("handler", "callback", "task", "hook", "listener"):
        yield "failed", Failure(kind, RuntimeError("boom"), "chat", "/x", "sid", "00ff")
    yield "failed", Failure("task", KeyError(NASTY), NASTY, NASTY, None, "00ff")
    yield "failed", Failure("task", SystemExit(), error_id="00ff")
    yield "rejected", Rejection("chat", "/", "sid", EventRejected("no", code="mine"))
    yield "rejected", Rejection(NASTY, NASTY, None, EventRejected("no", code=NASTY))
    yield "rejected", Rejection("chat", "/", "sid", RateLimited())
    answered = ValueError("boom")
    yield "rejected", Rejection("chat", "/", "sid", EventRejected(), answered, "00ff")
    for reason in ("expired", "gone", "stopped"):
        yield "callback_lost", CallbackLoss(reason, "sid")
    for old, new in (
        ("idle", "starting"),
        ("starting", "running"),
        ("running", "stalled"),
        ("stalled", "running"),
        ("stalled", "reconnecting"),
        ("running", "reconnecting"),
        ("reconnecting", "running"),
    ):
        change = ListenerChange(ListenerState(old), ListenerState(new), "")
        yield "listener_changed", change
    yield "listener_changed", ListenerChange(ListenerState.IDLE, ListenerState.RUNNING, NASTY)
    for name, make in (("broker_changed", BrokerChange), ("delivery_store_changed", StoreChange)):
        yield name, make(False, NASTY)
        yield name, make(False, "NOPERM", 0.0, True)
        yield name, make(True, "", 1.239)
    for reason in ("overflow", "refused", "exit"):
        yield "outbox_lost", OutboxLoss(3, reason, NASTY if reason == "refused" else "")
    for task in (LISTENER_TASK, "mine"):
        for new_state in (TaskState.RUNNING, TaskState.BACKING_OFF, TaskState.FAILED):
            yield "task_changed", TaskChange(task, TaskState.STARTING, new_state, NASTY)
    connecting, opened, ready, closing, closed = ConnectionState
    for sid, *path in (
        ("a", None, connecting, opened, ready, closing, closed),
        ("b", None, connecting, closed),
        ("c", None, connecting, closing, closed),
        ("d", None, connecting, opened),
    ):
        for before, after in itertools.pairwise(path):
            yield "connection_changed", ConnectionChange(sid, "/", before, after, "")
    yield "connection_changed", ConnectionChange("e", NASTY, None, connecting, "ping timeout")
    for reason in (
        *("full", "address", "rate", "unjoined", "application", "draining", "upgrade"),
        *("session", "elsewhere", "origin", "version", "request"),
    ):
        yield "handshake_refused", HandshakeRefusal(reason)
        yield "handshake_refused", HandshakeRefusal(reason, NASTY)
    for reason in ("websocket", "size", "packet", "payload", "attachments", "connects"):
        yield "protocol_violated", Violation(reason, NASTY if reason == "size" else "")
    for reason in ("slow", "volatile", "closed"):
        yield "send_lost", SendLoss(4, reason)
    yield "message_repeated", Repetition(NASTY, 7)
    yield "connections_swept", Sweep(5, ("rooms", "sockets"))
    for state in DeliveryState:
        yield "delivery_ended", DeliveryEnd("5f", "mara", NASTY, state, 3)
    yield "deliveries_abandoned", DeliveryLoss(6)
    yield "loop_blocked", LoopBlock("app.py:7 in nap", "stack\n")
    yield "loop_blocked", LoopBlock("app.py:7 in nap", "stack\n", 1.239)


def told(level: int, caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Send every record many times and return what that counts and writes."""
    found: list[dict[str, Any]] = []
    for signal, record in facts():
        # Each has an application of its own, but for connections, which have a past.
        if signal != "connection_changed" or not found or found[-1]["signal"] != signal:
            sender = Sender()
            counters = Counters(sender)
            lines = LogLines(sender, count=counters.add)
        before = counters.as_dict()
        caplog.clear()
        with caplog.at_level(level, "flask_socketio_guard"):
            for _ in range(1 if signal == "connection_changed" else 23):
                signals.send(getattr(signals, signal), sender, record)
            (key,) = lines.folder.counts or [None]
            lines.stop(0.0)
        counted = {name: n - before[name] for name, n in counters.as_dict().items()}
        found.append(
            {
                "signal": signal,
                "counted": {name: n for name, n in counted.items() if n},
                "class": repr(key).encode("utf-8", "backslashreplace").decode(),
                "lines": _once(_line(each) for each in caplog.records),
            }
        )
    return found


def _line(record: logging.LogRecord) -> dict[str, Any]:
    return {
        "logger": record.name,
        "level": record.levelname,
        "text": record.getMessage(),
        "exception": repr(record.exc_info[1]) if record.exc_info else None,
        "extra": {name: value for name, value in vars(record).items() if name not in PLAIN},
    }


def _once(lines: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return equal neighbours as one, with their number."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if found and found[-1]["line"] == line:
            found[-1]["times"] += 1
        else:
            found.append({"line": line, "times": 1})
    return found


@pytest.mark.parametrize("level", ["DEBUG", "WARNING"])
def test_every_record_is_counted_and_told_as_it_always_was(
    level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Counters, texts, levels, extras, loggers and folding classes are what people search for."""
    found = json.loads(json.dumps(told(getattr(logging, level), caplog)))
    known = json.loads(FACTS.read_text("utf-8"))[level]
    assert [each["signal"] for each in found] == [each["signal"] for each in known]
    for now, then in zip(found, known, strict=True):
        assert now == then
