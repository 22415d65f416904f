"""The change feed, the expiry leader and the gap: nothing stays missed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.core.runtime import clock
from flask_socketio_guard.core.supervisor import Restart, RestartPolicy, Supervisor
from flask_socketio_guard.delivery.records import Delivery
from flask_socketio_guard.delivery.steps import Expire
from flask_socketio_guard.delivery.store import Changes
from flask_socketio_guard.delivery.sync import ChangeFeed, ExpiryLeader, Gap
from flask_socketio_guard.errors import DeliveryStoreError
from tests.support import unit_support
from tests.support.unit_support import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask_socketio_guard.core.runtime import Runtime

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime

MESSAGE = Delivery("0" * 32, "ann", "news", "[]", 60.0)


class FakeStore:
    """Answers with what the test has prepared, and then with nothing."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.answers: list[Changes | BaseException | None] = []
        self.dead: list[Delivery] = []
        self.expired: list[list[Delivery]] = []
        self.is_leading = True
        self.is_unknown = True
        self.is_due = False
        self.asked: list[str] = []
        self.told_count = 0

    def changes(self, timeout: float) -> Changes | None:
        self.runtime.sleep(0.001)
        answer = self.answers.pop(0) if self.answers else Changes([], [])
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def heartbeat(self) -> bool:
        self.asked.append("heartbeat")
        was_unknown, self.is_unknown = self.is_unknown, False
        return was_unknown

    def lead(self) -> bool:
        self.asked.append("lead")
        return self.is_leading

    def has_expired(self) -> bool:
        self.asked.append("has_expired")
        return self.is_due

    def reap_dead_processes(self) -> list[Delivery]:
        dead, self.dead = self.dead, []
        return dead

    def told(self) -> None:
        self.told_count += 1

    def do(self, step: Expire) -> list[Delivery]:
        assert isinstance(step, Expire)
        self.asked.append("expire")
        self.is_due = False
        return self.expired.pop(0) if self.expired else []


class Running:
    """A feed and a leader whose tasks run."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.store = FakeStore(runtime)
        self.told: list[Any] = []
        self.gap_failures = 0
        self.answers: list[bool] = []
        self.gap = Gap(self._look_again)
        self.feed = ChangeFeed(
            runtime,
            self.store,  # type: ignore[arg-type]
            self.gap,
            on_stored=self.told.append,
            on_end=self._ended,
            on_answer=lambda: self.answers.append(True),
            on_lost=lambda _: self.answers.append(False),
        )
        self.leader = ExpiryLeader(
            runtime,
            self.store,  # type: ignore[arg-type]
            self.gap,
            lease=0.0,
            on_forgotten=lambda: self.told.append("forgotten"),
            on_end=self._ended,
        )
        self.supervisor = Supervisor(runtime, on_failure=lambda *_: None, on_change=lambda *_: None)

    def _ended(self, delivery: Delivery, is_new: bool) -> None:
        self.told.append((delivery, is_new))

    def _look_again(self) -> None:
        if self.gap_failures:
            self.gap_failures -= 1
            raise DeliveryStoreError("away")
        self.told.append("gap")

    def start(self, *names: str) -> None:
        policy = RestartPolicy(
            restart=Restart.ALWAYS, first_delay=0.0, max_delay=1.0, max_restarts=None
        )
        for name in names:
            target = {"follow": self.feed.follow, "lead": self.leader.lead}[name]
            self.supervisor.watch(name, target, policy=policy, is_internal=True)


@pytest.fixture
def running(runtime: Runtime, nothing_left_behind: None) -> Iterator[Running]:
    running = Running(runtime)
    yield running
    assert running.supervisor.stop(3.0, is_internal=True) == []


def test_a_gap_is_looked_up_until_that_succeeds(running: Running) -> None:
    running.store.answers = [None, Changes(["/,ann"], [MESSAGE])]
    running.gap_failures = 2
    running.start("follow")
    wait_for(running.runtime, lambda: len(running.told) == 3)
    assert running.told == ["gap", (MESSAGE, False), "/,ann"]


def test_ends_of_this_process_whose_answers_were_lost_are_new(running: Running) -> None:
    running.store.answers = [Changes([], [], [MESSAGE])]
    running.start("follow")
    wait_for(running.runtime, lambda: bool(running.told))
    assert running.told == [(MESSAGE, True)]


def test_the_leader_notes_that_it_has_told_what_it_ended(running: Running) -> None:
    running.store.expired = [[MESSAGE], [MESSAGE]]
    running.start("lead")
    wait_for(running.runtime, lambda: running.store.told_count >= 2)
    assert running.told == ["forgotten", *[(MESSAGE, True)] * 2]


def test_the_feed_asks_a_store_that_is_away_again(running: Running) -> None:
    running.store.answers = [
        DeliveryStoreError("away"),
        DeliveryStoreError("away"),
        Changes(["/,ann"], []),
    ]
    running.start("follow")
    wait_for(running.runtime, lambda: bool(running.told))
    assert running.told == ["/,ann"]
    wait_for(running.runtime, lambda: running.answers[:3] == [False, False, True])


def test_the_leader_expires_messages_and_reaps_dead_processes(
    running: Running,
) -> None:
    running.store.dead = [MESSAGE]
    running.store.expired = [[MESSAGE, MESSAGE], [MESSAGE]]
    running.start("lead")
    wait_for(running.runtime, lambda: len(running.told) == 5)
    assert running.told == ["forgotten", *[(MESSAGE, True)] * 4]


def test_a_leader_renews_its_lease_seldom_and_looks_for_what_expires_often(
    running: Running,
) -> None:
    asked = running.store.asked
    running.leader._lease = 60.0
    running.start("lead")
    wait_for(running.runtime, lambda: asked.count("has_expired") == 3)
    assert asked[:3] == ["heartbeat", "lead", "expire"]
    assert set(asked[3:]) == {"has_expired"}
    running.store.expired, running.store.is_due = [[MESSAGE]], True
    wait_for(running.runtime, lambda: (MESSAGE, True) in running.told)
    due = asked[asked.index("lead", 3) :][:3]
    assert due == ["lead", "expire", "expire"], "it makes sure of the clock before"
    running.store.is_leading, running.store.is_due = False, True
    wait_for(running.runtime, lambda: asked[-1] == "lead")
    running.store.expired = [[MESSAGE]]
    running.runtime.sleep(0.6)
    assert asked[-1] == "lead", "another process leads now"


def test_a_heartbeat_comes_twice_in_a_lease(running: Running) -> None:
    running.leader._lease = 1.0
    running.store.is_leading = False
    began_at = clock()
    running.start("lead")
    wait_for(running.runtime, lambda: running.store.asked.count("heartbeat") == 4)
    assert clock() - began_at > 1.4
    assert running.store.asked == ["heartbeat", "lead"] * 4


def test_a_leader_that_got_no_answer_begins_anew(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.leader._lease = 60.0
    failures = iter([DeliveryStoreError("away")])

    def has_expired() -> bool:
        for failure in failures:
            raise failure
        return False

    monkeypatch.setattr(running.store, "has_expired", has_expired)
    running.start("lead")
    wait_for(running.runtime, lambda: running.store.asked.count("heartbeat") == 2)
    assert running.gap._is_open


def test_a_process_that_does_not_lead_only_sends_its_heartbeat(running: Running) -> None:
    running.store.is_leading = False
    running.store.expired = [[MESSAGE]]
    running.start("lead")
    wait_for(running.runtime, lambda: bool(running.told))
    running.store.is_unknown = True
    wait_for(running.runtime, lambda: len(running.told) == 2)
    assert running.told == ["forgotten"] * 2


def test_a_callback_that_raises_opens_the_gap(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(address: str) -> None:
        raise RuntimeError("mine")

    monkeypatch.setattr(running.feed, "_on_stored", fail)
    running.store.answers = [Changes(["/,ann"], [])]
    running.start("follow")
    wait_for(running.runtime, lambda: running.told == ["gap"])


def test_messages_that_expired_without_an_answer_are_looked_up(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of the store was lost."""
    failures = iter([DeliveryStoreError("lost")])

    def give_up(step: Expire) -> list[Delivery]:
        for failure in failures:
            raise failure
        return []

    monkeypatch.setattr(running.store, "do", give_up)
    running.start("lead", "follow")
    wait_for(running.runtime, lambda: "gap" in running.told)


def test_what_is_missed_while_a_gap_is_looked_up_is_looked_up_too() -> None:
    looks: list[int] = []

    def look() -> None:
        looks.append(len(looks))
        if len(looks) == 1:
            gap.open()

    gap = Gap(look)
    gap.close()
    assert looks == [], "nothing was missed"
    gap.open()
    for _ in range(3):
        gap.close()
    assert looks == [0, 1]


def test_a_lookup_that_is_cut_short_is_done_again() -> None:
    """Whatever ends it, the stop of its task included."""
    failures: list[BaseException] = [DeliveryStoreError("away"), SystemExit()]
    looks: list[bool] = []

    def look() -> None:
        looks.append(not failures)
        if failures:
            raise failures.pop()

    gap = Gap(look)
    gap.open()
    for failure in (SystemExit, DeliveryStoreError):
        with pytest.raises(failure):
            gap.close()
    for _ in range(2):
        gap.close()
    assert looks == [False, False, True]
