"""Calls that are due later: each is made once, in time, or never."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flask_socketio_guard.core import deadlines as deadlines_module
from flask_socketio_guard.core.deadlines import Deadline, Deadlines
from flask_socketio_guard.core.runtime import GeventRuntime, Runtime, ThreadRuntime, clock
from flask_socketio_guard.core.supervisor import Restart, RestartPolicy, Supervisor, TaskHandle
from tests.support import unit_support
from tests.support.scale import examples
from tests.support.unit_support import FakeClock, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime

NEVER = 3600.0


@dataclass
class Due:
    """Deadlines, what they called, and the task that calls when it is started."""

    runtime: Runtime
    called: list[Any] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    task: TaskHandle | None = None

    def __post_init__(self) -> None:
        self.deadlines = Deadlines(self.runtime, on_failure=self.failures.append)

    def add(self, delay: float, name: object = "call") -> Deadline:
        return self.deadlines.call_later(delay, lambda: self.called.append(name))

    def call_due(self) -> None:
        """One turn of the task."""
        self.deadlines._call_due()

    def start(self) -> TaskHandle:
        crashes: list[BaseException] = []
        supervisor = Supervisor(
            self.runtime,
            on_failure=lambda _, exc: crashes.append(exc),
            on_change=lambda *_: None,
        )
        self.task = supervisor.watch(
            "deadlines",
            self.deadlines.run,
            policy=RestartPolicy(Restart.NEVER),
            wake=self.deadlines.wake,
        )
        return self.task

    def stop(self) -> float:
        """Stop the task and return how long that took."""
        assert self.task is not None
        began_at = clock()
        self.task.stop()
        assert self.task.join(8.0), "the task does not stop"
        assert self.task.last_error is None
        return clock() - began_at


class RecordingEvent:
    """The event of the deadlines, and for how long it was waited for."""

    def __init__(self, due: Due) -> None:
        self.inner = due.deadlines._changed
        self.waits: list[float] = []
        self.sets = 0
        self.on_clear: Callable[[], object] = lambda: None
        due.deadlines._changed = self

    def set(self) -> None:
        self.sets += 1
        self.inner.set()

    def clear(self) -> None:
        self.on_clear()
        self.inner.clear()

    def is_set(self) -> bool:
        return self.inner.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return self.inner.wait(timeout)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(deadlines_module, "clock", fake)
    return fake


@pytest.fixture
def due(fake_clock: FakeClock) -> Due:
    """Deadlines without a task, in a time that stands still."""
    del fake_clock
    return Due(ThreadRuntime())


@pytest.fixture
def ticking(runtime: Runtime) -> Iterator[Due]:
    """Deadlines with their task, in real time."""
    due = Due(runtime)
    due.start()
    yield due
    due.stop()


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Let threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


# What is due


def test_a_call_is_made_when_it_is_due_and_not_before(due: Due, fake_clock: FakeClock) -> None:
    deadline = due.add(2.0)
    assert deadline.at == fake_clock.now + 2.0
    due.call_due()
    fake_clock.advance(1.99)
    due.call_due()
    assert due.called == []
    assert len(due.deadlines) == 1
    fake_clock.advance(0.01)
    due.call_due()
    assert due.called == ["call"]
    assert len(due.deadlines) == 0


def test_a_call_is_made_once(due: Due, fake_clock: FakeClock) -> None:
    due.add(1.0)
    for _ in range(3):
        fake_clock.advance(5.0)
        due.call_due()
    assert due.called == ["call"]


def test_calls_are_made_in_the_order_of_their_deadlines(due: Due, fake_clock: FakeClock) -> None:
    delays = [float(number) for number in range(50)]
    shuffled = random.Random(7).sample(delays, len(delays))
    for delay in shuffled:
        due.add(delay, delay)
    fake_clock.advance(60.0)
    due.call_due()
    assert due.called == delays


def test_calls_of_one_instant_are_made_in_the_order_in_which_they_came(
    due: Due, fake_clock: FakeClock
) -> None:
    """Functions cannot be compared, and need not be."""
    for number in range(50):
        due.add(1.0, number)
    fake_clock.advance(1.0)
    due.call_due()
    assert due.called == list(range(50))


@pytest.mark.parametrize("delay", [0.0, -1.0])
def test_what_is_late_already_is_called_in_the_next_turn(due: Due, delay: float) -> None:
    due.add(delay)
    assert due.called == []
    due.call_due()
    assert due.called == ["call"]


def test_only_what_is_due_is_called(due: Due, fake_clock: FakeClock) -> None:
    for seconds in range(1, 6):
        due.add(float(seconds), seconds)
    fake_clock.advance(3.0)
    due.call_due()
    assert due.called == [1, 2, 3]
    assert len(due.deadlines) == 2


def test_a_call_may_ask_for_the_next_one(due: Due, fake_clock: FakeClock) -> None:
    """As a heartbeat does."""

    def beat() -> None:
        due.called.append(fake_clock.now)
        due.deadlines.call_later(1.0, beat)

    began_at = fake_clock.now
    due.deadlines.call_later(1.0, beat)
    for _ in range(3):
        fake_clock.advance(1.0)
        due.call_due()
    assert due.called == [began_at + 1.0, began_at + 2.0, began_at + 3.0]
    assert len(due.deadlines) == 1


# What is cancelled


def test_what_is_cancelled_is_not_called(due: Due, fake_clock: FakeClock) -> None:
    kept, cancelled = due.add(1.0, "kept"), due.add(1.0, "cancelled")
    cancelled.cancel()
    assert len(due.deadlines) == 1
    fake_clock.advance(2.0)
    due.call_due()
    assert due.called == ["kept"]
    assert len(due.deadlines) == 0
    kept.cancel()
    assert len(due.deadlines) == 0


def test_a_call_is_cancelled_as_often_as_one_likes(due: Due, fake_clock: FakeClock) -> None:
    first = due.add(1.0)
    due.add(2.0, "other")
    for _ in range(3):
        first.cancel()
        assert len(due.deadlines) == 1
    fake_clock.advance(5.0)
    due.call_due()
    first.cancel()
    assert due.called == ["other"]
    assert len(due.deadlines) == 0


def test_a_call_may_cancel_one_that_is_due_as_well(due: Due, fake_clock: FakeClock) -> None:
    later: list[Deadline] = []
    due.deadlines.call_later(1.0, lambda: later[0].cancel())
    later.append(due.add(1.0))
    fake_clock.advance(1.0)
    due.call_due()
    assert due.called == []
    assert len(due.deadlines) == 0


def test_a_call_may_cancel_itself(due: Due, fake_clock: FakeClock) -> None:
    """A timer that closes a connection is cancelled by the close."""
    own: list[Deadline] = []
    own.append(due.deadlines.call_later(1.0, lambda: own[0].cancel()))
    fake_clock.advance(1.0)
    due.call_due()
    assert len(due.deadlines) == 0


def test_what_is_cancelled_is_let_go_at_once(due: Due) -> None:
    """What it would have called may hold a client's whole history."""
    deadline = due.add(NEVER)
    assert deadline.target is not None
    deadline.cancel()
    assert deadline.target is None


def test_cancelled_calls_do_not_pile_up(due: Due, fake_clock: FakeClock) -> None:
    """Each pong cancels a deadline far ahead and asks for a new one."""
    kept = [due.add(NEVER, number) for number in range(100)]
    for _ in range(10_000):
        due.add(NEVER, "pong").cancel()
        assert len(due.deadlines) == 100
        assert len(due.deadlines._heap) <= 100 + 1002
    for deadline in kept[50:]:
        deadline.cancel()
    fake_clock.advance(NEVER)
    due.call_due()
    assert due.called == list(range(50))
    assert len(due.deadlines) == 0
    assert due.deadlines._heap == []


def test_few_cancelled_among_many_are_left_where_they_are(due: Due) -> None:
    """Throwing them out goes through the whole heap: it has to be worth it."""
    deadlines = [due.add(NEVER, number) for number in range(10_000)]
    for number, deadline in enumerate(deadlines, 1):
        deadline.cancel()
        if number == 5000:
            assert len(due.deadlines._heap) == 10_000
    assert len(due.deadlines) == 0
    assert len(due.deadlines._heap) <= 1001


# What fails


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(1), gevent.GreenletExit()])
def test_a_call_that_raises_is_told_and_the_others_are_made(
    due: Due, fake_clock: FakeClock, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    due.add(1.0, "before")
    due.deadlines.call_later(1.0, fail)
    due.add(1.0, "after")
    fake_clock.advance(1.0)
    due.call_due()
    assert due.called == ["before", "after"]
    assert due.failures == [error]
    assert len(due.deadlines) == 0


def test_the_task_outlives_a_call_that_raises(ticking: Due) -> None:
    def fail() -> None:
        raise SystemExit(1)

    ticking.deadlines.call_later(0.0, fail)
    ticking.add(0.01)
    wait_for(ticking.runtime, lambda: ticking.called)
    assert [type(exc) for exc in ticking.failures] == [SystemExit]


# The task


def test_the_task_calls_in_time(ticking: Due) -> None:
    asked_at = clock()
    made_at: list[float] = []
    ticking.deadlines.call_later(0.1, lambda: made_at.append(clock()))
    wait_for(ticking.runtime, lambda: made_at)
    assert 0.1 <= made_at[0] - asked_at < 1.0


def test_what_was_asked_for_before_the_task_began_is_called(runtime: Runtime) -> None:
    due = Due(runtime)
    due.add(0.02, "second")
    due.add(0.0, "first")
    due.start()
    wait_for(runtime, lambda: len(due.called) == 2)
    assert due.called == ["first", "second"]
    due.stop()


def test_an_earlier_deadline_wakes_the_task(ticking: Due) -> None:
    event = RecordingEvent(ticking)
    ticking.add(NEVER)
    ticking.deadlines.wake()
    wait_for(ticking.runtime, lambda: event.waits)
    began_at = clock()
    ticking.add(0.05, "soon")
    wait_for(ticking.runtime, lambda: ticking.called)
    assert ticking.called == ["soon"]
    assert clock() - began_at < 1.0


def test_a_later_deadline_lets_the_task_sleep(runtime: Runtime) -> None:
    """Ten thousand clients that each ask for a ping are not ten thousand wake-ups."""
    due = Due(runtime)
    event = RecordingEvent(due)
    due.add(2.0)
    due.start()
    wait_for(runtime, lambda: event.waits)
    for number in range(100):
        due.add(3.0 + number)
    assert event.sets == 0
    assert len(event.waits) == 1
    assert 1.0 < event.waits[0] <= 2.0
    due.stop()


def test_the_task_sleeps_until_something_is_due(runtime: Runtime) -> None:
    """And never for long: a wake-up may have been missed."""
    due = Due(runtime)
    event = RecordingEvent(due)
    due.start()
    wait_for(runtime, lambda: event.waits)
    due.add(NEVER)
    due.deadlines.wake()
    wait_for(runtime, lambda: len(event.waits) == 2)
    due.add(0.2)
    wait_for(runtime, lambda: due.called)
    wait_for(runtime, lambda: len(event.waits) == 4)
    longest = deadlines_module._LONGEST_SLEEP
    assert event.waits[:2] == [longest, longest]
    assert 0.0 < event.waits[2] <= 0.2
    assert event.waits[3] == longest
    due.stop()


def test_a_missed_wake_up_delays_a_call_and_does_not_lose_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines_module, "_LONGEST_SLEEP", 0.1)
    due = Due(runtime)
    event = RecordingEvent(due)
    due.start()
    wait_for(runtime, lambda: event.waits)
    monkeypatch.setattr(event, "set", lambda: None)
    due.add(0.0)
    wait_for(runtime, lambda: due.called, timeout=2.0)
    due.stop()


def test_a_deadline_asked_for_while_others_are_called_is_not_overslept(runtime: Runtime) -> None:
    due = Due(runtime)
    due.deadlines.call_later(0.0, lambda: due.add(0.02, "next"))
    began_at = clock()
    due.start()
    wait_for(runtime, lambda: due.called)
    assert clock() - began_at < 1.0
    due.stop()


def test_the_task_stops_at_once(runtime: Runtime) -> None:
    due = Due(runtime)
    event = RecordingEvent(due)
    due.add(NEVER)
    due.start()
    wait_for(runtime, lambda: event.waits)
    assert due.stop() < 1.0
    assert due.called == []


def test_the_task_stops_at_once_also_when_it_is_told_at_an_awkward_moment(
    runtime: Runtime,
) -> None:
    """Between its look at whether it shall stop and its wait."""
    due = Due(runtime)
    event = RecordingEvent(due)
    stopped: list[float] = []

    def stop() -> None:
        if due.task is not None and not stopped:
            stopped.append(clock())
            due.task.stop()

    task = due.start()
    wait_for(runtime, lambda: event.waits)
    event.on_clear = stop
    due.deadlines.wake()
    wait_for(runtime, lambda: stopped)
    has_ended = task.join(1.0)
    due.stop()
    assert has_ended, "it sleeps on"


def test_nothing_is_called_after_the_stop(ticking: Due) -> None:
    ticking.add(0.05)
    ticking.stop()
    ticking.runtime.sleep(0.1)
    assert ticking.called == []
    assert len(ticking.deadlines) == 1


# Threads


def test_each_call_is_made_or_cancelled_when_threads_meet(
    quick_switches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the books are right in the end, however often what is void is thrown out."""
    monkeypatch.setattr(deadlines_module, "_MIN_STALE", 3)
    due = Due(ThreadRuntime())
    due.start()
    wanted: list[set[int]] = []

    def ask(first: int) -> None:
        rng = random.Random(first)
        kept = set()
        for number in range(first, first + 1000):
            if number % 2:
                due.add(rng.random() * 0.01, number)
                kept.add(number)
            else:
                due.add(NEVER, number).cancel()
        wanted.append(kept)

    threads = [threading.Thread(target=ask, args=[10_000 * number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = set().union(*wanted)
    wait_for(due.runtime, lambda: len(due.called) >= len(expected))
    due.stop()
    assert sorted(due.called) == sorted(expected)
    assert len(due.deadlines) == 0


def test_the_books_are_right_when_calls_are_cancelled_just_when_they_are_due(
    quick_switches: None,
) -> None:
    """Whichever is first: it was called, or it was not, and nothing waits any more."""
    due = Due(ThreadRuntime())
    deadlines = [due.add(0.0, number) for number in range(3000)]
    barrier = threading.Barrier(3)

    def call() -> None:
        barrier.wait()
        due.call_due()

    def cancel() -> None:
        barrier.wait()
        for deadline in deadlines:
            deadline.cancel()

    threads = [threading.Thread(target=target) for target in (call, cancel, cancel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    due.call_due()
    assert due.deadlines._heap == []
    assert due.deadlines._stale == 0
    assert len(set(due.called)) == len(due.called)


# Random walks


class DeadlinesWalk(RuleBasedStateMachine):
    """Asks, cancels and lets time pass, and follows by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.patches = contextlib.ExitStack()
        patch = self.patches.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(deadlines_module, "clock", self.clock)
        patch.setattr(deadlines_module, "_MIN_STALE", 3)
        self.due = Due(GeventRuntime())
        self.asked: list[Deadline] = []
        self.waiting: dict[int, float] = {}
        self.expected: list[int] = []

    def teardown(self) -> None:
        self.patches.close()

    @rule(delay=st.sampled_from([0.0, 0.5, 1.0, 1.0, 4.0, 30.0]))
    def ask(self, delay: float) -> None:
        number = len(self.asked)
        self.asked.append(self.due.add(delay, number))
        self.waiting[number] = self.clock.now + delay

    @precondition(lambda self: self.asked)
    @rule(choice=st.integers(min_value=0, max_value=10_000))
    def cancel(self, choice: int) -> None:
        number = choice % len(self.asked)
        self.asked[number].cancel()
        self.waiting.pop(number, None)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.due.call_due()
        due = sorted((at, number) for number, at in self.waiting.items() if at <= self.clock.now)
        for _, number in due:
            self.expected.append(number)
            del self.waiting[number]

    @invariant()
    def all_are_accounted_for(self) -> None:
        assert self.due.called == self.expected
        assert len(self.due.deadlines) == len(self.waiting)
        assert len(self.due.deadlines._heap) <= 2 * len(self.waiting) + 3 + 1


TestDeadlinesWalk = DeadlinesWalk.TestCase
TestDeadlinesWalk.settings = settings(
    max_examples=examples(30),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
