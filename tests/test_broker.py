"""One truth on whether the message queue answers, told once for each change."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from flask_socketio_guard.errors import BrokerError
from flask_socketio_guard.queue import reachability as broker_module
from flask_socketio_guard.queue.reachability import Reachability
from tests.support import unit_support
from tests.support.unit_support import FakeClock

if TYPE_CHECKING:
    from flask_socketio_guard.core.runtime import Runtime

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime


@dataclass
class Checked:
    """A broker whose check answers as it is told to."""

    reason: str | None = None
    category: str = "unreachable"
    changes: list[tuple[bool, str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.broker = Reachability(self._check, on_change=self._changed)

    def _check(self) -> BrokerError | None:
        return None if self.reason is None else BrokerError(self.reason, category=self.category)

    def _changed(self, is_reachable: bool, reason: str, duration: float) -> None:
        assert self.broker.is_reachable is is_reachable
        self.changes.append((is_reachable, reason, duration))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(broker_module, "clock", fake)
    return fake


def test_a_broker_is_reachable_until_somebody_says_otherwise() -> None:
    checked = Checked()
    assert checked.broker.is_reachable
    checked.broker.report_answer()
    assert checked.changes == []


def test_a_loss_is_told_once_with_the_first_reason() -> None:
    checked = Checked()
    checked.broker.report_lost("connection refused")
    checked.broker.report_lost("timed out")
    assert not checked.broker.is_reachable
    assert checked.changes == [(False, "connection refused", 0.0)]


def test_an_answer_is_told_once_with_the_time_that_it_took(clock: FakeClock) -> None:
    checked = Checked()
    checked.broker.report_lost("connection refused")
    clock.advance(12.5)
    checked.broker.report_answer()
    checked.broker.report_answer()
    assert checked.broker.is_reachable
    assert checked.changes[1:] == [(True, "", 12.5)]


def test_a_check_reports_what_it_finds() -> None:
    checked = Checked(reason="no route")
    assert checked.broker.check() is False
    assert checked.changes == [(False, "no route", 0.0)]
    checked.reason = None
    assert checked.broker.check() is True
    assert checked.broker.is_reachable
    assert len(checked.changes) == 2


def test_a_refusal_that_lasts_is_told_although_the_broker_was_away() -> None:
    """It was away for a restart, and came back with another password."""
    checked = Checked()
    checked.broker.report_lost("connection refused")
    assert not checked.broker.is_refusing
    for _ in range(2):
        checked.broker.report_lost("invalid password", "authentication")
    assert checked.broker.is_refusing
    checked.broker.report_lost("connection refused")
    assert not checked.broker.is_refusing
    assert [reason for _, reason, _ in checked.changes] == [
        "connection refused",
        "invalid password",
    ]
    checked.broker.report_answer()
    assert checked.broker.trouble == ""
    assert checked.broker.has_answered


def test_a_check_tells_what_kind_of_trouble_it_is() -> None:
    checked = Checked(reason="not trusted", category="certificate")
    assert not checked.broker.check()
    assert checked.broker.trouble == "certificate"
    assert not checked.broker.has_answered


def test_many_who_report_at_once_make_one_change(runtime: Runtime) -> None:
    checked = Checked()
    jobs = [
        runtime.spawn(lambda: checked.broker.report_lost("gone"), name="reporter")
        for _ in range(20)
    ]
    assert all(job.join(5.0) for job in jobs)
    assert checked.changes == [(False, "gone", 0.0)]


def test_a_subscriber_may_ask_and_report_from_within(nothing_left_behind: None) -> None:
    """It is told outside of the lock."""
    seen = []

    def changed(is_reachable: bool, reason: str, duration: float) -> None:
        seen.append(is_reachable)
        if not is_reachable:
            broker.report_lost("again")
            broker.report_answer()

    broker = Reachability(lambda: None, on_change=changed)
    thread = threading.Thread(target=broker.report_lost, args=("gone",), daemon=True)
    thread.start()
    thread.join(5.0)
    assert not thread.is_alive(), "deadlock"
    assert seen == [False, True]
