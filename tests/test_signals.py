"""Signals: every subscriber hears, whatever the others do."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from dataclasses import FrozenInstanceError, is_dataclass

import pytest
from blinker import NamedSignal

from flask_socketio_guard import signals as offered
from flask_socketio_guard.errors import EventRejected, HandlerTimeout
from flask_socketio_guard.states import ConnectionState, DeliveryState
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.telemetry.records import (
    ConnectionChange,
    DeliveryEnd,
    Failure,
    HandshakeRefusal,
    LoopBlock,
    OutboxLoss,
    Rejection,
    Repetition,
    SendLoss,
    Sweep,
    Violation,
)
from tests.support.cases import in_turn

CONNECTING = ConnectionState.CONNECTING


class Sender:
    """Something that has signals."""


def test_a_record_reaches_every_subscriber_of_its_sender_only() -> None:
    sender, other = Sender(), Sender()
    heard: list[tuple[str, object]] = []
    subscriptions = [
        signals.subscribe(signals.outbox_lost, sender, lambda record: heard.append(("a", record))),
        signals.subscribe(signals.outbox_lost, sender, lambda record: heard.append(("b", record))),
        signals.subscribe(signals.outbox_lost, other, lambda record: heard.append(("c", record))),
        signals.subscribe(signals.task_changed, sender, lambda record: heard.append(("d", record))),
    ]
    record = OutboxLoss(1, "overflow")
    signals.send(signals.outbox_lost, sender, record)
    assert sorted(heard, key=str) == [("a", record), ("b", record)]
    del subscriptions


@pytest.mark.parametrize(
    "raised",
    [RuntimeError(), SystemExit(3), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_a_subscriber_that_raises_is_logged_and_the_others_hear(
    raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises: it ends neither the worker nor the news."""
    sender = Sender()
    heard: list[object] = []

    def fail(record: object) -> None:
        raise raised

    subscriptions = [
        signals.subscribe(signals.outbox_lost, sender, fail),
        signals.subscribe(signals.outbox_lost, sender, heard.append),
        signals.subscribe(signals.outbox_lost, sender, fail),
    ]
    with caplog.at_level(logging.ERROR, "flask_socketio_guard"):
        signals.send(signals.outbox_lost, sender, OutboxLoss(1, "overflow"))
    assert len(heard) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "a subscriber of 'outbox-lost' raised"
    ] * 2
    assert all(record.exc_info for record in caplog.records)
    del subscriptions


def test_a_subscription_ends_when_its_owner_drops_it() -> None:
    """So a discarded application neither hears nor stays."""
    sender = Sender()
    heard: list[object] = []
    subscription = signals.subscribe(signals.outbox_lost, sender, heard.append)
    signals.send(signals.outbox_lost, sender, OutboxLoss(1, "overflow"))
    del subscription
    gc.collect()
    signals.send(signals.outbox_lost, sender, OutboxLoss(1, "overflow"))
    assert len(heard) == 1


def test_a_sender_without_weak_references_has_subscribers_too() -> None:
    sender = object()
    heard: list[object] = []
    subscription = signals.subscribe(signals.outbox_lost, sender, heard.append)
    signals.send(signals.outbox_lost, sender, OutboxLoss(1, "overflow"))
    signals.send(signals.outbox_lost, object(), OutboxLoss(1, "overflow"))
    del subscription
    signals.send(signals.outbox_lost, sender, OutboxLoss(1, "overflow"))
    assert len(heard) == 1


def test_a_signal_does_not_keep_its_sender() -> None:
    sender = Sender()
    reference = weakref.ref(sender)
    subscription = signals.subscribe(signals.outbox_lost, sender, lambda _record: None)
    del sender, subscription
    gc.collect()
    assert reference() is None


def test_a_signal_is_heard_by_plain_blinker_subscribers() -> None:
    """As the application connects them: ``receiver(sender, record=...)``."""
    sender = Sender()
    heard = []

    def receiver(given: object, *, record: object) -> None:
        heard.append((given, record))

    signals.failed.connect(receiver, sender=sender)
    failure = Failure("task", RuntimeError())
    signals.send(signals.failed, sender, failure)
    assert heard == [(sender, failure)]


def test_every_failure_has_an_id_of_its_own() -> None:
    ids = {Failure("handler", RuntimeError()).error_id for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[0-9a-f]{16}", error_id) for error_id in ids)


def test_a_failure_tells_its_code() -> None:
    assert Failure("handler", RuntimeError()).code == "internal_error"
    assert Failure("handler", HandlerTimeout(1.0)).code == "timeout"
    assert Failure("handler", TimeoutError()).code == "internal_error"


def test_a_record_cannot_be_changed_by_a_subscriber() -> None:
    record = Rejection("chat", "/", None, EventRejected())
    with pytest.raises(FrozenInstanceError):
        record.event = "other"  # type: ignore[misc]


@in_turn(
    ("signal", "record"),
    [
        (signals.connection_changed, ConnectionChange("sid", "/", None, CONNECTING)),
        (signals.handshake_refused, HandshakeRefusal("full")),
        (signals.protocol_violated, Violation("packet")),
        (signals.send_lost, SendLoss(1, "slow")),
        (signals.message_repeated, Repetition("x", 7)),
        (signals.connections_swept, Sweep(2, ("rooms",))),
        (signals.delivery_ended, DeliveryEnd("5f", "mara", "note", DeliveryState.GONE, 3)),
        (signals.loop_blocked, LoopBlock("app.py:7 in nap", "stack")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_fact_about_clients_has_a_signal_and_a_record_of_its_own(
    signal: NamedSignal, record: object
) -> None:
    sender = Sender()
    heard: list[object] = []
    subscription = signals.subscribe(signal, sender, heard.append)
    signals.send(signal, sender, record)
    assert heard == [record]
    with pytest.raises(FrozenInstanceError):
        record.reason = "other"  # type: ignore[attr-defined]
    del subscription


def test_signals_are_told_apart_by_their_names() -> None:
    """Two of one name would be one."""
    found = [value for value in vars(signals).values() if isinstance(value, NamedSignal)]
    assert len({signal.name for signal in found}) == len(found) == 17


def test_applications_are_offered_every_signal_and_record() -> None:
    made = {
        name
        for name, value in vars(signals).items()
        if isinstance(value, NamedSignal) or (is_dataclass(value) and isinstance(value, type))
    }
    assert set(offered.__all__) == made
    assert all(getattr(offered, name) is getattr(signals, name) for name in made)
