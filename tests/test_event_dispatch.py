"""Events of one client: so many at a time, so many that wait, some in order, none forgotten."""

from __future__ import annotations

import json
import random
import sys
import threading
import tracemalloc
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flask_socketio_guard.core.jobs import SpawnThrottle
from flask_socketio_guard.core.runtime import GeventRuntime, Runtime, ThreadRuntime
from flask_socketio_guard.events.dispatch import Arrival, DispatchBounds, EventDispatcher, memory_of
from tests.support import unit_support
from tests.support.cases import in_turn
from tests.support.scale import examples
from tests.support.unit_support import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime

MANY = 1000


class Job:
    """An event whose handler runs until it is released."""

    def __init__(
        self,
        taking: Taking,
        name: object,
        ordering_key: Hashable,
        size: int,
        owner: object = "owner",
    ) -> None:
        self.taking = taking
        self.name = name
        self.ordering_key = ordering_key
        self.size = size
        self.owner = owner
        self.has_begun = self.has_ended = self.is_lost = False
        self.released = taking.runtime.flag()
        self.then: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        return f"<Job {self.name} of {self.ordering_key}>"

    def run(self) -> None:
        assert self.is_waiting
        self.has_begun = True
        self.taking.begun.append(self.name)
        try:
            assert self.released.wait(10.0), "nobody released it"
            self.then()
        finally:
            self.has_ended = True

    def lose(self) -> None:
        assert self.is_waiting
        self.is_lost = True
        self.taking.lost.append(self.name)

    @property
    def is_early(self) -> bool:
        return self.owner in self.taking.early

    @property
    def is_waiting(self) -> bool:
        return not (self.has_begun or self.is_lost)

    @property
    def is_running(self) -> bool:
        return self.has_begun and not self.has_ended


@dataclass
class Taking:
    """A dispatcher, and what became of its jobs."""

    runtime: Runtime
    max_running: int = 2
    max_waiting_bytes: int = 1000 * MANY
    max_running_bytes: int = 1000 * MANY
    early: set[object] = field(default_factory=set)
    jobs: list[Job] = field(default_factory=list)
    begun: list[Any] = field(default_factory=list)
    lost: list[Any] = field(default_factory=list)
    tasks: list[Any] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        lock: Any = nullcontext() if self.runtime.can_kill else threading.Lock()
        bounds = DispatchBounds(self.max_running, self.max_waiting_bytes, self.max_running_bytes)
        self.dispatcher = EventDispatcher(
            bounds,
            spawn=self._spawn,
            spawn_later=self._spawn_later,
            lock=lock,
        )

    def _spawn(self, target: Callable[[], object]) -> None:
        self.tasks.append(self.runtime.spawn(target, name="event"))

    def _spawn_later(self, target: Callable[[], object]) -> None:
        self.runtime.call_later(0.0, target)

    def submit(
        self,
        name: object,
        ordering_key: Hashable = None,
        *,
        size: int = 1,
        is_quick: bool = False,
        owner: object = "owner",
    ) -> Job:
        job = Job(self, name, ordering_key, size, owner)
        if is_quick:
            job.released.set()
        self.dispatcher.submit(job, "x" * size, is_early=job.is_early)
        self.jobs.append(job)
        return job

    def release(self, *jobs: Job) -> None:
        for job in jobs:
            job.released.set()
        for job in jobs:
            wait_for(self.runtime, lambda job=job: job.has_ended, message=f"{job} does not end")

    def wait_until_begun(self, *names: object) -> None:
        message = f"{names} are not what begins"
        wait_for(self.runtime, lambda: self.begun == list(names), message=message)

    def finish(self) -> None:
        """Let everything end, and see that nothing is kept of it."""
        for job in self.jobs:
            job.released.set()
        wait_for(
            self.runtime,
            lambda: not any(job.is_waiting or job.is_running for job in self.jobs),
            message="not everything has its turn",
        )
        wait_for(self.runtime, lambda: not self.dispatcher.running and not self.dispatcher.waiting)
        for task in self.tasks:
            assert task.join(5.0)
        ends = [task.exception for task in self.tasks if task.exception is not None]
        assert ends == self.errors
        dispatcher = self.dispatcher
        assert (
            dispatcher.running,
            dispatcher.running_size,
            dispatcher.waiting,
            dispatcher.size,
        ) == (0, 0, 0, 0)
        assert not self.dispatcher.is_full
        assert self.dispatcher._behind_by_key == self.dispatcher._early == {}
        assert not self.dispatcher._waiting


@pytest.fixture
def take(runtime: Runtime) -> Iterator[Callable[..., Taking]]:
    """Return a function that makes a dispatcher; what it runs has ended afterwards."""
    made: list[Taking] = []

    def make(**options: int) -> Taking:
        made.append(Taking(runtime, **options))
        return made[-1]

    yield make
    for taking in made:
        taking.finish()


# How many run


def test_an_event_runs_in_a_task_of_its_own(take: Callable[..., Taking]) -> None:
    """The client's packets are read on meanwhile."""
    taking = take()
    here = (threading.get_ident(), gevent.getcurrent())
    there: list[object] = []
    job = taking.submit("a")
    job.then = lambda: there.append((threading.get_ident(), gevent.getcurrent()))
    taking.wait_until_begun("a")
    assert taking.dispatcher.running == 1
    taking.release(job)
    assert here not in there
    assert len(there) == 1
    wait_for(
        taking.runtime, lambda: not taking.dispatcher.running and not taking.dispatcher.waiting
    )


def test_so_many_run_at_a_time_and_the_others_wait_for_their_turn(
    take: Callable[..., Taking],
) -> None:
    taking = take(max_running=3)
    jobs = [taking.submit(number) for number in range(7)]
    wait_for(taking.runtime, lambda: len(taking.begun) == 3)
    assert sorted(taking.begun) == [0, 1, 2]
    assert (taking.dispatcher.running, taking.dispatcher.waiting) == (3, 4)
    for number in range(4):
        taking.release(jobs[number])
        wait_for(taking.runtime, lambda count=number + 4: len(taking.begun) == count)
        assert taking.begun[-1] == number + 3
        assert (taking.dispatcher.running, taking.dispatcher.waiting) == (3, 3 - number)


def test_others_have_their_turn_between_two_events(nothing_left_behind: None) -> None:
    """A client whose events are quick, and many, is not the only one."""
    taking = Taking(GeventRuntime(), max_running=1)
    held = taking.submit(0)
    for number in range(1, 10):
        taking.submit(number, "ordering_key" if number % 3 else None, is_quick=True)

    def tick() -> None:
        while taking.dispatcher.running or taking.dispatcher.waiting:
            taking.begun.append("other")
            gevent.sleep(0)

    ticking = gevent.spawn(tick)
    taking.release(held)
    ticking.join(5.0)
    taking.finish()
    events = [index for index, name in enumerate(taking.begun) if name != "other"]
    assert [taking.begun[index] for index in events] == list(range(10))
    assert all(later - earlier > 1 for earlier, later in pairwise(events))


def test_what_comes_when_all_is_done_runs_again(take: Callable[..., Taking]) -> None:
    taking = take(max_running=1)
    for number in range(5):
        taking.submit(number, "ordering_key" if number % 2 else None, is_quick=True)
        wait_for(
            taking.runtime, lambda: not taking.dispatcher.running and not taking.dispatcher.waiting
        )
    assert taking.begun == [0, 1, 2, 3, 4]


def test_what_runs_is_bounded_in_bytes_too(take: Callable[..., Taking]) -> None:
    """One alone always runs; small ones do not overtake a large one, and then run together."""
    bound = memory_of("x" * 10_000)
    taking = take(max_running=4, max_running_bytes=bound)
    first = taking.submit("first", size=20_000)
    large = taking.submit("large", size=9_000)
    small = [taking.submit(number) for number in range(3)]
    taking.wait_until_begun("first")
    assert (taking.dispatcher.running, taking.dispatcher.waiting) == (1, 4)
    assert taking.dispatcher.running_size == memory_of("x" * 20_000)
    taking.release(first)
    taking.wait_until_begun("first", "large")
    assert (taking.dispatcher.running, taking.dispatcher.waiting) == (1, 3)
    taking.release(large)
    wait_for(taking.runtime, lambda: len(taking.begun) == 5)
    assert taking.dispatcher.running == 3
    assert taking.dispatcher.running_size == 3 * memory_of("x")
    taking.release(*small)


# How much waits


def test_all_that_waits_is_taken_and_its_size_is_known(take: Callable[..., Taking]) -> None:
    """Who reads the client's packets looks at it."""
    taking = take(max_running=1, max_waiting_bytes=3 * memory_of("x"))
    running = taking.submit("runs", size=10_000)
    assert (taking.dispatcher.size, taking.dispatcher.is_full) == (0, False)
    first = taking.submit("first")
    taking.submit("second", "ordering_key", is_quick=True)
    assert not taking.dispatcher.is_full
    taking.submit("third", "ordering_key", is_quick=True)
    taking.submit("fourth", is_quick=True)
    assert taking.dispatcher.is_full
    assert (taking.dispatcher.waiting, taking.dispatcher.size) == (4, 4 * memory_of("x"))
    taking.release(running)
    wait_for(taking.runtime, lambda: taking.dispatcher.waiting == 3)
    assert taking.dispatcher.is_full
    taking.release(first)
    taking.finish()
    assert taking.begun == ["runs", "first", "second", "third", "fourth"]
    assert taking.lost == []


def test_who_stopped_reading_is_told_of_room(take: Callable[..., Taking]) -> None:
    taking = take(max_running=1, max_waiting_bytes=1)
    running = taking.submit("runs")
    taking.submit("waits", is_quick=True)
    sizes: list[int] = []
    taking.dispatcher.on_room = lambda: sizes.append(taking.dispatcher.size)
    taking.release(running)
    wait_for(taking.runtime, lambda: sizes)  # in a thread it is told last
    assert sizes == [0]


@in_turn(
    "value",
    [
        [],
        "x",
        "x" * 10_000,
        "\N{PILE OF POO}" * 1000,
        [[] for _ in range(1000)],
        [{} for _ in range(1000)],
        [{"a": number} for number in range(1000)],
        {str(number): [str(number), number / 3, None] for number in range(1000)},
        list(range(1000, 2000)),
    ],
    ids=["nothing", "short", "long", "wide", "lists", "dicts", "filled", "mixed", "numbers"],
)
def test_the_memory_of_an_event_is_not_thought_to_be_less_than_it_is(value: object) -> None:
    message = "42" + json.dumps(["event", value], separators=(",", ":"), ensure_ascii=False)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    kept = [json.loads(message[2:]) for _ in range(20)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / len(kept) < memory_of(message)


def test_the_memory_of_a_packet_in_bytes_counts_what_a_byte_may_be() -> None:
    """As those of MessagePack."""
    assert memory_of(b"\x90" * 1000) >= 1000 * 8


# Early events


def test_what_comes_early_runs_in_order_when_its_owner_is_let_in(
    take: Callable[..., Taking],
) -> None:
    taking = take(max_running=1)
    taking.early.add("new")
    for number in range(3):
        taking.submit(number, owner="new", is_quick=True)
    taking.submit("other", is_quick=True)
    taking.wait_until_begun("other")
    assert (taking.dispatcher.waiting, taking.dispatcher.size) == (3, 3 * memory_of("x"))
    taking.early.clear()
    taking.submit(3, owner="new", is_quick=True)  # not in front of those that came before
    taking.dispatcher.release("new")
    wait_for(
        taking.runtime, lambda: not taking.dispatcher.running and not taking.dispatcher.waiting
    )
    assert taking.begun == ["other", 0, 1, 2, 3]
    taking.submit(4, owner="new", is_quick=True)


def test_what_comes_early_has_its_lane(take: Callable[..., Taking]) -> None:
    taking = take(max_running=4)
    taking.early.add("new")
    jobs = [taking.submit(number, "ordering_key", owner="new") for number in range(3)]
    taking.early.clear()
    taking.dispatcher.release("new")
    for number, job in enumerate(jobs):
        taking.wait_until_begun(*range(number + 1))
        taking.release(job)


def test_what_comes_early_is_lost_with_its_owner(take: Callable[..., Taking]) -> None:
    taking = take()
    taking.early.add("new")
    taking.submit("a", owner="new")
    taking.submit("b", "ordering_key", owner="new")
    taking.dispatcher.drop("new")
    assert taking.lost == ["a", "b"]
    taking.dispatcher.release("new")
    assert taking.begun == []


def test_who_was_let_in_a_moment_ago_is_not_early(take: Callable[..., Taking]) -> None:
    """It was, when somebody looked; then its connect handler ended."""
    taking = take()
    job = Job(taking, "a", None, 1, "new")
    taking.jobs.append(job)
    taking.dispatcher.submit(job, "x", is_early=True)
    taking.wait_until_begun("a")


# Lanes


def test_events_of_one_ordering_key_run_one_at_a_time_and_in_order(
    take: Callable[..., Taking],
) -> None:
    taking = take(max_running=5)
    jobs = [taking.submit(number, "ordering_key") for number in range(5)]
    for number, job in enumerate(jobs):
        taking.wait_until_begun(*range(number + 1))
        assert (taking.dispatcher.running, taking.dispatcher.waiting) == (1, 4 - number)
        taking.release(job)


def test_ordering_key_do_not_wait_for_each_other(take: Callable[..., Taking]) -> None:
    taking = take(max_running=5)
    first = [taking.submit(f"{ordering_key}1", ordering_key) for ordering_key in "abc"]
    for ordering_key in "abc":
        taking.submit(f"{ordering_key}2", ordering_key)
    wait_for(taking.runtime, lambda: len(taking.begun) == 3)
    assert sorted(taking.begun) == ["a1", "b1", "c1"]
    taking.release(first[1])
    wait_for(taking.runtime, lambda: len(taking.begun) == 4)
    assert taking.begun[-1] == "b2"


def test_events_without_a_ordering_key_pass_those_that_wait_in_one(
    take: Callable[..., Taking],
) -> None:
    taking = take(max_running=2)
    taking.submit("a1", "a")
    taking.submit("a2", "a")
    taking.submit("free", is_quick=True)
    taking.submit("free too", is_quick=True)
    wait_for(taking.runtime, lambda: len(taking.begun) == 3)
    assert sorted(taking.begun) == ["a1", "free", "free too"]
    assert taking.dispatcher.waiting == 1


def test_a_ordering_key_keeps_its_order_when_all_was_busy_before(
    take: Callable[..., Taking],
) -> None:
    """Two wait because nothing more may run; a third comes when the first of them runs."""
    taking = take(max_running=1)
    busy = taking.submit("busy")
    first, second = taking.submit("first", "ordering_key"), taking.submit("second", "ordering_key")
    taking.release(busy)
    wait_for(taking.runtime, lambda: first.has_begun)
    third = taking.submit("third", "ordering_key")
    taking.release(first)
    wait_for(taking.runtime, lambda: second.has_begun or third.has_begun)
    taking.finish()
    assert taking.begun == ["busy", "first", "second", "third"]


def test_a_ordering_key_that_is_never_empty_keeps_nobody_waiting_for_ever(
    take: Callable[..., Taking],
) -> None:
    taking = take(max_running=1)
    running = taking.submit("ordering_key 0", "ordering_key")
    other = taking.submit("other", is_quick=True)
    for number in range(1, 20):
        following = taking.submit(f"ordering_key {number}", "ordering_key")
        taking.release(running)
        wait_for(taking.runtime, lambda job=following: other.has_begun or job.has_begun)
        if other.has_begun:
            break
        running = following
    assert other.has_begun, "it is overtaken again and again"


def test_a_ordering_key_is_any_value_and_none_is_no_lane(take: Callable[..., Taking]) -> None:
    taking = take(max_running=10)
    for ordering_key in (0, "", (), ("/", "chat"), ("/other", "chat"), None, None):
        taking.submit(str(ordering_key), ordering_key)
    wait_for(taking.runtime, lambda: len(taking.begun) == 7)
    assert not taking.dispatcher.waiting
    taking.submit("waits", ("/", "chat"))
    assert taking.dispatcher.waiting == 1


@pytest.mark.parametrize("max_running", [1, 2, 3])
def test_nothing_stalls(take: Callable[..., Taking], max_running: int) -> None:
    """Wherever the jobs wait: whoever ends finds the next."""
    taking = take(max_running=max_running)
    rng = random.Random(max_running)
    held = [taking.submit(("held", number), None) for number in range(max_running)]
    for number in range(100):
        ordering_key = rng.choice([None, "a", "b", "c"])
        taking.submit((ordering_key, number), ordering_key, is_quick=True)
    taking.release(*held)
    wait_for(
        taking.runtime, lambda: not taking.dispatcher.running and not taking.dispatcher.waiting
    )
    assert len(taking.begun) == max_running + 100
    for ordering_key in "abc":
        numbers = [number for name, number in taking.begun if name == ordering_key]
        assert numbers == sorted(numbers)


# The end


def test_what_waits_of_another_owner_stays(take: Callable[..., Taking]) -> None:
    taking = take(max_running=1)
    running = taking.submit("runs", "ordering_key", owner="other")
    for number in range(9):
        owner = "owner" if number % 2 else "other"
        taking.submit(number, "ordering_key" if number % 3 else None, owner=owner, is_quick=True)
    taking.dispatcher.drop("owner")
    assert taking.lost == [1, 3, 5, 7]
    taking.release(running)
    taking.finish()
    assert taking.begun == ["runs", 0, 2, 4, 6, 8]


def test_what_waits_is_lost_once_when_the_client_leaves(take: Callable[..., Taking]) -> None:
    taking = take(max_running=2)
    running = [taking.submit("a1", "a"), taking.submit("free")]
    for name, ordering_key in (
        ("a2", "a"),
        ("b1", "b"),
        ("a3", "a"),
        ("free too", None),
        ("b2", "b"),
    ):
        taking.submit(name, ordering_key)
    wait_for(taking.runtime, lambda: len(taking.begun) == 2)
    taking.dispatcher.drop("owner")
    assert taking.lost == ["a2", "b1", "a3", "free too", "b2"]
    assert (taking.dispatcher.running, taking.dispatcher.waiting) == (2, 0)
    taking.dispatcher.drop("owner")
    assert len(taking.lost) == 5
    taking.release(*running)
    taking.finish()
    assert sorted(taking.begun) == ["a1", "free"]
    assert len(taking.lost) == 5


def test_a_close_makes_room_for_nothing_that_was_lost(take: Callable[..., Taking]) -> None:
    taking = take(max_running=1)
    taking.submit("runs", "ordering_key")
    taking.submit("a", "ordering_key", size=50)
    taking.submit("b", size=50)
    taking.dispatcher.drop("owner")
    taking.submit("c", "ordering_key", size=50, is_quick=True)
    taking.submit("d", "ordering_key", size=50, is_quick=True)
    assert taking.dispatcher.size == 2 * memory_of("x" * 50)
    taking.finish()
    assert taking.begun == ["runs", "c", "d"]
    assert sorted(taking.lost) == ["a", "b"]


def test_who_is_told_of_a_loss_may_ask_the_intake(take: Callable[..., Taking]) -> None:
    """The books are closed, and not held, when it is told."""
    taking = take(max_running=1)
    taking.submit("runs")
    seen: list[int] = []

    class Asking(Job):
        def lose(self) -> None:
            super().lose()
            taking.dispatcher.drop("owner")
            seen.append(taking.dispatcher.waiting)

    for number in range(3):
        job = Asking(taking, number, None, 1)
        taking.jobs.append(job)
        taking.dispatcher.submit(job, "x")
    taking.dispatcher.drop("owner")
    assert seen == [0, 0, 0]


def test_a_close_with_nothing_there_does_nothing(take: Callable[..., Taking]) -> None:
    taking = take()
    taking.dispatcher.drop("owner")
    taking.submit("a", is_quick=True)
    taking.finish()
    assert (taking.begun, taking.lost) == (["a"], [])


# What fails


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(1), gevent.GreenletExit()])
@pytest.mark.parametrize("ordering_key", [None, "ordering_key"])
def test_an_event_that_raises_keeps_no_other_waiting(
    take: Callable[..., Taking], ordering_key: str | None, error: BaseException
) -> None:
    """It is not to raise; but then its place, and its ordering_key, are free again."""
    taking = take(max_running=1)

    def fail() -> None:
        raise error

    taking.errors.append(error)
    failing = taking.submit("fails", ordering_key)
    failing.then = fail
    for number in range(3):
        taking.submit(number, ordering_key, is_quick=True)
    failing.released.set()
    wait_for(
        taking.runtime, lambda: not taking.dispatcher.running and not taking.dispatcher.waiting
    )
    assert taking.begun == ["fails", 0, 1, 2]
    taking.submit("later", ordering_key, is_quick=True)
    taking.finish()
    assert taking.begun[-1] == "later"


def test_an_event_that_raises_when_nothing_waits_makes_room(take: Callable[..., Taking]) -> None:
    taking = take(max_running=1)
    taking.errors.append(ValueError("boom"))

    def fail() -> None:
        raise taking.errors[0]

    failing = taking.submit("fails", "ordering_key")
    failing.then = fail
    failing.released.set()
    wait_for(
        taking.runtime, lambda: not taking.dispatcher.running and not taking.dispatcher.waiting
    )
    taking.submit("next", "ordering_key", is_quick=True)


def test_an_event_whose_greenlet_is_killed_keeps_no_other_waiting(
    nothing_left_behind: None,
) -> None:
    taking = Taking(GeventRuntime(), max_running=1)
    taking.submit("killed", "ordering_key")
    taking.submit("waits in the ordering_key", "ordering_key", is_quick=True)
    taking.submit("waits", is_quick=True)
    wait_for(taking.runtime, lambda: taking.begun)
    taking.tasks[0].kill()
    wait_for(
        taking.runtime, lambda: not taking.dispatcher.running and not taking.dispatcher.waiting
    )
    taking.errors.append(taking.tasks[0].exception)
    taking.finish()
    assert taking.begun == ["killed", "waits in the ordering_key", "waits"]


# Many at once


@pytest.mark.parametrize("is_closed", [False, True], ids=["stays", "leaves"])
def test_each_runs_once_or_is_lost_once_when_tasks_meet(runtime: Runtime, is_closed: bool) -> None:
    """One that reads, many that run, and one that closes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    rng = random.Random(5)
    taking = Taking(runtime, max_running=4)
    inside: list[object] = []
    overlaps: list[object] = []

    def work(ordering_key: Hashable) -> None:
        if len(inside) >= 4 or (ordering_key is not None and ordering_key in inside):
            overlaps.append(ordering_key)
        inside.append(ordering_key)
        runtime.sleep(0)
        inside.remove(ordering_key)

    try:
        for number in range(600):
            ordering_key = rng.choice([None, None, "a", "b"])
            job = Job(taking, (ordering_key, number), ordering_key, 1)
            job.then = lambda ordering_key=ordering_key: work(ordering_key)
            job.released.set()
            taking.dispatcher.submit(job, "x")
            taking.jobs.append(job)
            if number % 10 == 0:
                runtime.sleep(0)
            if is_closed and number % 100 == 99:
                taking.dispatcher.drop("owner")
        taking.finish()
    finally:
        sys.setswitchinterval(interval)
    assert overlaps == []
    assert len(taking.begun) + len(taking.lost) == len(taking.jobs) == 600
    assert bool(taking.lost) is is_closed or not taking.lost
    for ordering_key in "ab":
        numbers = [number for name, number in taking.begun if name == ordering_key]
        assert numbers == sorted(numbers)


class Watched(EventDispatcher):
    """A dispatcher that sees to it that its books are changed by one thread at a time."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("running", "waiting", "size", "is_full") and hasattr(self, name):
            assert self._lock.locked(), f"{name} is changed by anybody"
        super().__setattr__(name, value)


def test_the_books_are_changed_by_one_thread_at_a_time(nothing_left_behind: None) -> None:
    taking = Taking(ThreadRuntime(), max_running=1)
    bounds = DispatchBounds(1, MANY, MANY)
    taking.dispatcher = Watched(
        bounds, spawn=taking._spawn, spawn_later=taking._spawn_later, lock=threading.Lock()
    )
    running = taking.submit("runs", "ordering_key")
    taking.submit("waits in the ordering_key", "ordering_key", is_quick=True)
    taking.submit("waits", is_quick=True)
    taking.release(running)
    taking.finish()
    taking.submit("runs again").released.set()
    taking.submit("is lost", "ordering_key")
    taking.dispatcher.drop("owner")
    taking.finish()
    assert len(taking.begun) + len(taking.lost) == 5


# Random walks


class Stepping(Taking):
    """Whose tasks all begin in the order in which they were asked for."""

    def _spawn_later(self, target: Callable[[], object]) -> None:
        self._spawn(target)


class IntakeWalk(RuleBasedStateMachine):
    """Submits, ends and closes in any order, and follows by hand."""

    max_running = 3
    max_waiting_bytes = 6 * memory_of("x")
    max_running_bytes = 1000 * MANY

    def __init__(self) -> None:
        super().__init__()
        self.taking = Stepping(
            GeventRuntime(),
            max_running=self.max_running,
            max_waiting_bytes=self.max_waiting_bytes,
            max_running_bytes=self.max_running_bytes,
        )
        self.number = 0

    def teardown(self) -> None:
        self.taking.finish()

    @property
    def running(self) -> list[Job]:
        return [job for job in self.taking.jobs if job.is_running]

    @property
    def waiting(self) -> list[Job]:
        return [job for job in self.taking.jobs if job.is_waiting]

    def _settle(self) -> None:
        for _ in range(5):
            gevent.sleep(0)

    @rule(ordering_key=st.sampled_from(["a", "b", None]), size=st.sampled_from([1, 1, 5, 50]))
    def submit(self, ordering_key: str | None, size: int) -> None:
        self.number += 1
        self.taking.submit(self.number, ordering_key, size=size)
        self._settle()

    @rule(ordering_keys=st.lists(st.sampled_from(["a", "b", None]), min_size=2, max_size=6))
    def submit_many(self, ordering_keys: list[str | None]) -> None:
        for ordering_key in ordering_keys:
            self.submit(ordering_key, 1)

    @precondition(lambda self: self.running)
    @rule(choice=st.integers(min_value=0, max_value=10))
    def end(self, choice: int) -> None:
        running = self.running
        running[choice % len(running)].released.set()
        self._settle()

    @precondition(lambda self: len(self.waiting) > 3)
    @rule()
    def close(self) -> None:
        waiting = self.waiting
        self.taking.dispatcher.drop("owner")
        assert all(job.is_lost for job in waiting)
        self._settle()

    @invariant()
    def the_books_are_right(self) -> None:
        dispatcher, running, waiting = self.taking.dispatcher, self.running, self.waiting
        assert dispatcher.running == len(running) <= self.max_running
        assert dispatcher.waiting == len(waiting)
        assert dispatcher.size == sum(memory_of("x" * job.size) for job in waiting)
        assert dispatcher.running_size == sum(memory_of("x" * job.size) for job in running)
        assert len(running) <= 1 or dispatcher.running_size <= self.max_running_bytes
        assert dispatcher.is_full == (dispatcher.size >= self.max_waiting_bytes)

    @invariant()
    def each_ordering_key_has_one_at_a_time_and_its_order(self) -> None:
        ordering_keys = [job.ordering_key for job in self.running if job.ordering_key is not None]
        assert len(ordering_keys) == len(set(ordering_keys))
        for ordering_key in (None, "a", "b"):
            jobs = {job.name: job for job in self.taking.jobs if job.ordering_key == ordering_key}
            begun = [name for name in self.taking.begun if name in jobs]
            waiting = [name for name, job in jobs.items() if job.is_waiting]
            assert [*begun, *waiting] == sorted([*begun, *waiting])

    @invariant()
    def nothing_waits_that_could_run(self) -> None:
        ordering_keys = [job.ordering_key for job in self.running]
        ready = [
            job
            for job in self.waiting
            if job.ordering_key is None or job.ordering_key not in ordering_keys
        ]
        if ready and len(ordering_keys) < self.max_running:
            assert len(ordering_keys) >= 1
            size = memory_of("x" * ready[0].size)
            assert self.taking.dispatcher.running_size + size > self.max_running_bytes


class NarrowIntakeWalk(IntakeWalk):
    max_running = 1


class HeavyIntakeWalk(IntakeWalk):
    max_running_bytes = 2 * memory_of("x") + 10


TestHeavyIntakeWalk = HeavyIntakeWalk.TestCase
TestIntakeWalk = IntakeWalk.TestCase
TestNarrowIntakeWalk = NarrowIntakeWalk.TestCase
_few = settings(
    max_examples=examples(30),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
for _walk in (TestIntakeWalk, TestNarrowIntakeWalk, TestHeavyIntakeWalk):
    _walk.settings = _few


def test_threads_have_a_lock_and_greenlets_need_none() -> None:
    """What the fixtures take for granted of the two runtimes."""
    assert GeventRuntime.can_kill
    assert not ThreadRuntime.can_kill


# Arrivals


def test_an_arrival_begins_once(take: Callable[..., Taking]) -> None:
    """Its owner counts those that have not."""

    class Counting:
        unbegun = 0

        def expect(self) -> None:
            self.unbegun += 1

        def begun(self) -> None:
            self.unbegun -= 1

    owner = Counting()
    arrivals = [Arrival(owner) for _ in range(3)]
    assert owner.unbegun == 3
    arrivals[0].begin()
    arrivals[0].begin()
    assert owner.unbegun == 2


# Many tasks that begin at once


def _unreached() -> None:
    raise AssertionError("its task could be started")


@dataclass
class Turns:
    """An event loop that turns when it is told to."""

    later: list[Callable[[], object]] = field(default_factory=list)
    started: list[object] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starter = SpawnThrottle(self.later.append)

    def start(self, *names: object) -> None:
        for name in names:
            self.starter.start(lambda name=name: self.started.append(name), _unreached)

    def turn(self) -> None:
        calls, self.later[:] = list(self.later), []
        for call in calls:
            try:
                call()
            except Exception as exc:
                self.errors.append(exc)


def test_tasks_are_started_later_and_in_order(runtime: Runtime) -> None:
    started: list[int] = []
    starter = SpawnThrottle(lambda target: runtime.call_later(0.0, target))
    for number in range(100):
        starter.start(lambda number=number: started.append(number), _unreached)
    wait_for(runtime, lambda: len(started) == 100)
    assert started == list(range(100))
    starter.start(lambda: started.append(100), _unreached)
    wait_for(runtime, lambda: len(started) == 101)


def test_nothing_is_started_in_the_turn_in_which_it_is_asked_for() -> None:
    turns = Turns()
    turns.start("a", "b")
    assert turns.started == []
    assert len(turns.later) == 1
    turns.turn()
    assert turns.started == ["a", "b"]
    assert turns.later == []


def test_a_few_tasks_are_started_in_each_turn() -> None:
    turns = Turns()
    turns.start(*range(40))
    counts = []
    while turns.later:
        turns.turn()
        counts.append(len(turns.started))
    assert counts[:3] == [16, 32, 40]
    assert turns.started == list(range(40))


@in_turn("count", [1, 15, 16, 17, 32])
def test_what_comes_when_all_was_started_is_started(count: int) -> None:
    turns = Turns()
    for first in (0, count):
        turns.start(*range(first, first + count))
        assert len(turns.later) == 1
        while turns.later:
            turns.turn()
    assert turns.started == list(range(2 * count))


def test_what_is_asked_for_while_others_are_started_has_its_turn() -> None:
    turns = Turns()
    turns.starter.start(lambda: turns.start("later"), _unreached)
    turns.start("first")
    while turns.later:
        assert len(turns.later) == 1
        turns.turn()
    assert turns.started == ["first", "later"]


def test_a_task_that_cannot_be_started_keeps_no_other_from_it() -> None:
    """A process may be out of threads for a moment."""
    turns = Turns()

    def fail() -> None:
        raise RuntimeError("can't start new thread")

    turns.start("before")
    turns.starter.start(fail, lambda: turns.started.append("instead"))
    turns.start("after")
    while turns.later:
        turns.turn()
    turns.start("next")
    while turns.later:
        turns.turn()
    assert turns.started == ["before", "instead", "after", "next"]


def test_what_could_not_be_started_is_when_the_next_is() -> None:
    """The thread of a timer is a thread, too."""
    later: list[Callable[[], object]] = []
    started: list[str] = []
    fails = [True, False]

    def spawn_later(target: Callable[[], object]) -> None:
        if fails.pop(0):
            raise RuntimeError("can't start new thread")
        later.append(target)

    starter = SpawnThrottle(spawn_later)
    for name in ("first", "second"):
        starter.start(lambda name=name: started.append(name), _unreached)
    fails[:] = [False]
    later.pop()()
    assert started == ["first", "second"]


def test_every_task_is_started_when_threads_meet(nothing_left_behind: None) -> None:
    runtime = ThreadRuntime()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    started: list[object] = []
    starter = SpawnThrottle(lambda target: runtime.call_later(0.0, target))

    def ask(name: str) -> None:
        for number in range(200):
            mark = (name, number)
            starter.start(lambda mark=mark: started.append(mark), _unreached)

    jobs = [runtime.spawn(lambda name=name: ask(name), name=name) for name in "abc"]
    try:
        assert all(job.join(10.0) for job in jobs)
        wait_for(runtime, lambda: len(started) == 600)
    finally:
        sys.setswitchinterval(interval)
    for name in "abc":
        assert [number for who, number in started if who == name] == list(range(200))
