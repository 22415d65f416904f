"""Every loss has a number."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

import pytest

from flask_socketio_guard.errors import EventRejected
from flask_socketio_guard.queue.listener import LISTENER_TASK
from flask_socketio_guard.states import ConnectionState, DeliveryState, ListenerState, TaskState
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.telemetry.counters import Counters
from flask_socketio_guard.telemetry.records import (
    CallbackLoss,
    ConnectionChange,
    DeliveryEnd,
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
from tests.support.cases import in_turn

if TYPE_CHECKING:
    from blinker import NamedSignal

NAMES = {
    "handler_failures",
    "callback_failures",
    "task_failures",
    "hook_failures",
    "listener_failures",
    "events_rejected",
    "callbacks_expired",
    "callbacks_dropped",
    "outbox_dropped",
    "listener_restarts",
    "listener_stalls",
    "task_restarts",
    "connections_opened",
    "connections_closed",
    "connections_swept",
    "handshakes_refused",
    "sessions_elsewhere",
    "protocol_violations",
    "sends_dropped",
    "messages_repeated",
    "deliveries_acknowledged",
    "deliveries_dead",
    "deliveries_withdrawn",
    "deliveries_abandoned",
    "loop_blocks",
    "log_lines_folded",
}
CONNECTING, OPEN, READY, CLOSING, CLOSED = ConnectionState
RUNNING, BACKING_OFF = TaskState.RUNNING, TaskState.BACKING_OFF


class Sender:
    """An application."""


def ended(state: str) -> DeliveryEnd:
    return DeliveryEnd("5f", "mara", "note", DeliveryState(state), 3)


def test_what_never_happened_is_zero() -> None:
    assert Counters(Sender()).as_dict() == dict.fromkeys(NAMES, 0)


@in_turn(
    ("signal", "record", "counted"),
    [
        *(
            (signals.failed, Failure(kind, RuntimeError()), {f"{kind}_failures": 1})
            for kind in ("handler", "callback", "task", "hook", "listener")
        ),
        (signals.rejected, Rejection("x", "/", None, EventRejected()), {"events_rejected": 1}),
        (signals.callback_lost, CallbackLoss("expired", "sid"), {"callbacks_expired": 1}),
        (signals.callback_lost, CallbackLoss("gone", "sid"), {"callbacks_dropped": 1}),
        (signals.callback_lost, CallbackLoss("stopped", "sid"), {"callbacks_dropped": 1}),
        (signals.outbox_lost, OutboxLoss(7, "overflow"), {"outbox_dropped": 7}),
        (signals.outbox_lost, OutboxLoss(2, "refused"), {"outbox_dropped": 2}),
        (
            signals.listener_changed,
            ListenerChange(ListenerState.RUNNING, ListenerState.STALLED, ""),
            {"listener_stalls": 1},
        ),
        (
            signals.listener_changed,
            ListenerChange(ListenerState.STALLED, ListenerState.RUNNING, ""),
            {},
        ),
        (signals.task_changed, TaskChange("x", RUNNING, BACKING_OFF, ""), {"task_restarts": 1}),
        (signals.task_changed, TaskChange("x", BACKING_OFF, RUNNING, ""), {}),
        (
            signals.task_changed,
            TaskChange(LISTENER_TASK, RUNNING, BACKING_OFF, ""),
            {"listener_restarts": 1},
        ),
        (signals.handshake_refused, HandshakeRefusal("full"), {"handshakes_refused": 1}),
        (signals.handshake_refused, HandshakeRefusal("session"), {"handshakes_refused": 1}),
        (
            signals.handshake_refused,
            HandshakeRefusal("elsewhere"),
            {"handshakes_refused": 1, "sessions_elsewhere": 1},
        ),
        (signals.protocol_violated, Violation("packet"), {"protocol_violations": 1}),
        (signals.send_lost, SendLoss(7, "slow"), {"sends_dropped": 7}),
        (signals.send_lost, SendLoss(2, "closed"), {"sends_dropped": 2}),
        (signals.message_repeated, Repetition("x", 7), {"messages_repeated": 1}),
        (signals.connections_swept, Sweep(3, ("rooms",)), {"connections_swept": 3}),
        (signals.delivery_ended, ended("delivered"), {"deliveries_acknowledged": 1}),
        (signals.delivery_ended, ended("cancelled"), {"deliveries_withdrawn": 1}),
        (signals.delivery_ended, ended("replaced"), {"deliveries_withdrawn": 1}),
        (signals.delivery_ended, ended("expired"), {"deliveries_dead": 1}),
        (signals.delivery_ended, ended("gone"), {"deliveries_dead": 1}),
        (signals.delivery_ended, ended("refused"), {"deliveries_dead": 1}),
        (signals.loop_blocked, LoopBlock("app.py:7 in nap", "stack"), {}),
        (signals.loop_blocked, LoopBlock("app.py:7 in nap", "stack", 1.5), {"loop_blocks": 1}),
        (signals.loop_blocked, LoopBlock("app.py:7 in nap", "stack", 0.0), {"loop_blocks": 1}),
    ],
)
def test_each_fact_is_counted_where_it_belongs(
    signal: NamedSignal, record: object, counted: dict[str, int]
) -> None:
    sender = Sender()
    counters = Counters(sender)
    signals.send(signal, sender, record)
    signals.send(signal, Sender(), record)
    assert {name: count for name, count in counters.as_dict().items() if count} == counted


def test_counts_are_a_copy() -> None:
    counters = Counters(Sender())
    counters.as_dict()["handler_failures"] = 5
    assert counters.as_dict()["handler_failures"] == 0


def test_two_applications_count_for_themselves() -> None:
    first, second = Sender(), Sender()
    counters = Counters(first), Counters(second)
    signals.send(signals.outbox_lost, second, OutboxLoss(3, "overflow"))
    assert [each.as_dict()["outbox_dropped"] for each in counters] == [0, 3]


def test_threads_that_count_at_once_lose_no_count() -> None:
    sender = Sender()
    counters = Counters(sender)
    record = OutboxLoss(1, "overflow")

    def count() -> None:
        for _ in range(500):
            signals.send(signals.outbox_lost, sender, record)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=count) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert counters.as_dict()["outbox_dropped"] == 4000


def move(sender: Sender, sid: str, *states: ConnectionState) -> None:
    """Let a new connection go through *states*."""
    old: ConnectionState | None = None
    for new in states:
        signals.send(signals.connection_changed, sender, ConnectionChange(sid, "/", old, new))
        old = new


@in_turn(
    ("states", "counted"),
    [
        ((CONNECTING,), (0, 0)),
        ((CONNECTING, OPEN), (1, 0)),
        ((CONNECTING, OPEN, READY), (1, 0)),
        ((CONNECTING, OPEN, CLOSING), (1, 0)),
        ((CONNECTING, OPEN, CLOSING, CLOSED), (1, 1)),
        ((CONNECTING, OPEN, READY, CLOSING, CLOSED), (1, 1)),
        ((CONNECTING, CLOSED), (0, 0)),
        ((CONNECTING, CLOSING, CLOSED), (0, 0)),
    ],
    ids=lambda value: "-".join(str(state) for state in value),
)
def test_every_connection_that_was_open_is_counted_once_each_way(
    states: tuple[ConnectionState, ...], counted: tuple[int, int]
) -> None:
    """Who was refused, or left during its connect handler, never was open."""
    sender = Sender()
    counters = Counters(sender)
    move(sender, "sid", *states)
    move(Sender(), "sid", *states)
    counts = counters.as_dict()
    assert (counts["connections_opened"], counts["connections_closed"]) == counted


def test_connections_are_told_apart() -> None:
    sender = Sender()
    counters = Counters(sender)
    move(sender, "a", CONNECTING, OPEN)
    move(sender, "b", CONNECTING, CLOSING, CLOSED)
    assert counters.as_dict()["connections_closed"] == 0
    move(sender, "c", CONNECTING, OPEN, CLOSING, CLOSED)
    assert counters.as_dict()["connections_closed"] == 1
    assert counters._open == {"a"}, "a connection that has closed is remembered"


def test_what_has_no_signal_can_be_counted() -> None:
    counters = Counters(Sender())
    counters.add("log_lines_folded")
    counters.add("log_lines_folded", 4)
    assert counters.as_dict()["log_lines_folded"] == 5


def test_a_count_that_nobody_would_see_is_refused() -> None:
    with pytest.raises(KeyError):
        Counters(Sender()).add("log_lines_foldde")


def test_every_count_is_described() -> None:
    described = Counters.as_dict.__doc__ or ""
    assert [name for name in NAMES if f"``{name}``" not in described] == []
