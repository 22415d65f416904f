"""What waits for one client: bounded, in order, every loss counted; and who writes when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flask_socketio_guard.clients import send_queue as sending
from flask_socketio_guard.clients.send_queue import (
    SendOutcome,
    SendQueue,
    SlowConsumer,
    WriteBatcher,
)
from flask_socketio_guard.config import GuardConfig
from flask_socketio_guard.core.runtime import GeventRuntime, Runtime
from flask_socketio_guard.errors import ConfigError
from flask_socketio_guard.upstream.engineio.outgoing import ClientMessage
from tests.support import unit_support
from tests.support.cases import in_turn
from tests.support.scale import examples
from tests.support.unit_support import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime

DISCONNECT = SlowConsumer.DISCONNECT
DROP_OLDEST = SlowConsumer.DROP_OLDEST
DROP_VOLATILE = SlowConsumer.DROP_VOLATILE
ALL = 1 << 30


@dataclass(frozen=True)
class Item:
    """A message that has a size and a name, and nothing else."""

    name: str
    size: int = 10
    is_event: bool = True
    is_volatile: bool = False


def event(name: str, size: int = 10) -> Item:
    return Item(name, size)


def volatile(name: str, size: int = 10) -> Item:
    return Item(name, size, is_volatile=True)


def control(name: str, size: int = 10) -> Item:
    """An acknowledgement, a ping, a connect packet: somebody waits for it."""
    return Item(name, size, is_event=False)


def make(
    *items: Item, packets: int = 1000, size: int = 1000, policy: SlowConsumer = DISCONNECT
) -> SendQueue:
    queue = SendQueue(max_packets=packets, max_bytes=size, policy=policy)
    for item in items:
        queue.put(item)
    return queue


def names(items: Iterable[Any]) -> list[str]:
    return [item.name for item in items]


def waiting(queue: SendQueue) -> list[str]:
    return names(queue._items)


# Words


def test_an_outcome_is_the_word_that_it_stands_for() -> None:
    """It is compared with, and written to logs and JSON as, that word."""
    words = ["queued", "dropped_closed", "dropped_slow", "handed_to_queue"]
    assert [str(outcome) for outcome in SendOutcome] == words
    assert [f"{outcome}" for outcome in SendOutcome] == words
    assert list(SendOutcome) == words


@pytest.mark.parametrize("policy", SlowConsumer)
def test_each_policy_has_its_setting(policy: SlowConsumer) -> None:
    assert SlowConsumer(GuardConfig(slow_consumer=policy.value).slow_consumer) is policy


def test_no_setting_is_without_its_policy() -> None:
    assert SlowConsumer(GuardConfig().slow_consumer) is DISCONNECT
    with pytest.raises(ConfigError):
        GuardConfig(slow_consumer="wait")


# The queue


def test_an_empty_queue_has_room() -> None:
    queue = make(packets=1, size=1)
    assert not queue.is_full
    assert not queue.is_filling
    assert not queue
    assert (len(queue), queue.size) == (0, 0)
    assert queue.take(100) == []


def test_what_came_first_is_taken_first() -> None:
    queue = make(*(event(str(number)) for number in range(20)))
    taken: list[str] = []
    while queue:
        taken += names(queue.take(30))
    assert taken == [str(number) for number in range(20)]


def test_as_much_is_taken_as_asked_for_and_not_more() -> None:
    queue = make(event("a", 10), event("b", 20), event("c", 30), event("d", 1))
    assert names(queue.take(30)) == ["a", "b"]
    assert names(queue.take(30)) == ["c"]
    assert names(queue.take(30)) == ["d"]
    assert queue.take(30) == []


@pytest.mark.parametrize("max_bytes", [0, 1, 99])
def test_at_least_one_is_taken(max_bytes: int) -> None:
    """A message that is larger than what is written at a time must not stay for ever."""
    queue = make(event("a", 100), event("b", 0))
    assert names(queue.take(max_bytes)) == ["a"]


def test_what_was_taken_counts_no_more() -> None:
    queue = make(event("a", 10), event("b", 20), event("c", 30))
    queue.take(30)
    assert (len(queue), queue.size) == (1, 30)
    queue.take(30)
    assert (len(queue), queue.size) == (0, 0)


def test_a_queue_is_full_with_so_many_messages() -> None:
    queue = make(event("a"), event("b"), packets=3)
    assert not queue.is_full
    queue.put(event("c"))
    assert queue.is_full
    queue.take(10)
    assert not queue.is_full


def test_a_queue_is_full_with_so_many_bytes() -> None:
    queue = make(event("a", 50), event("b", 49), size=100)
    assert not queue.is_full
    queue.put(event("c", 1))
    assert queue.is_full
    queue.take(50)
    assert not queue.is_full


def test_a_client_that_reads_a_large_message_is_not_slow() -> None:
    """Pings and events are put behind it, and are not what is too much."""
    queue = make(event("huge", 5000), size=100, packets=2)
    queue.take(10)
    assert (queue.size, queue.is_full, queue.is_filling) == (0, False, False)
    queue.put(event("a", 99))
    assert not queue.is_full
    queue.put(event("b", 1))
    assert queue.is_full


@in_turn(
    ("count", "size", "is_filling"),
    [(4, 1, False), (5, 1, True), (1, 49, False), (1, 50, True), (1, 1000, True)],
)
def test_a_queue_is_filling_from_the_half_on(count: int, size: int, is_filling: bool) -> None:
    queue = make(packets=10, size=100)
    for number in range(count):
        queue.put(event(str(number), size))
    assert queue.is_filling is is_filling


class Clock:
    """A clock that tests put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(sending, "clock", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the queues of this test."""
    return Clock(monkeypatch)


def test_much_at_a_time_makes_no_client_slow(clock: Clock) -> None:
    queue = make(*[event(str(number), 100) for number in range(50)], size=1000)
    clock.now += 9.9
    assert not queue.is_slow(10.0, is_shared=True)
    assert (queue.is_over(5), queue.is_over(6)) == (True, False)


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_client_that_takes_nothing_for_a_time_is_slow(clock: Clock, is_shared: bool) -> None:
    queue = make(event("a", 1000), event("b", 1000), size=1000)
    clock.now += 10.0
    assert queue.is_slow(10.0, is_shared=is_shared)
    queue.take(1)
    assert not queue.is_slow(10.0, is_shared=is_shared)
    clock.now += 9.0
    queue.progressed()
    clock.now += 9.0
    assert not queue.is_slow(10.0, is_shared=is_shared)
    clock.now += 1.0
    assert queue.is_slow(10.0, is_shared=is_shared)


def test_a_client_that_is_behind_all_the_time_is_slow_for_those_with_others_to_serve(
    clock: Clock,
) -> None:
    """It takes something now and then, and its queue is never empty."""
    queue = make(*[event(str(number), 100) for number in range(10)], size=1000)
    for _ in range(4):
        assert not queue.is_slow(10.0, is_shared=True)
        clock.now += 5.0
        queue.take(1)
        queue.put(event("more", 100))
    assert queue.is_slow(10.0, is_shared=True)
    assert not queue.is_slow(10.0, is_shared=False), "its own handlers may wait for it"
    queue.take(600)
    queue.put(event("more", 600))
    assert not queue.is_slow(10.0, is_shared=True), "it has caught up"


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("put", [SendQueue.offer, SendQueue.put])
def test_a_client_that_was_idle_is_not_slow_at_its_first_burst(
    clock: Clock, put: Callable[[SendQueue, Item], object], is_shared: bool
) -> None:
    """It has taken nothing for long, for there was nothing to take."""
    queue = make(size=1000)
    clock.now += 60.0
    put(queue, event("burst", 1000))
    assert queue.is_full
    clock.now += 9.9
    assert not queue.is_slow(10.0, is_shared=is_shared)
    clock.now += 0.2
    assert queue.is_slow(10.0, is_shared=is_shared)


@pytest.mark.parametrize(("size", "packets"), [(100, 1000), (1, 10)], ids=["bytes", "packets"])
def test_a_client_that_takes_as_much_as_may_wait_is_fast_enough_for_everybody(
    clock: Clock, size: int, packets: int
) -> None:
    """A stream may be longer than what may wait; its client is behind all the time."""
    queue = make(*[event(str(number), size) for number in range(10)], size=1000, packets=packets)
    for _ in range(50):
        assert queue.is_full
        assert not queue.is_slow(10.0, is_shared=True)
        clock.now += 2.0
        queue.take(1)
        queue.put(event("more", size))


def test_a_download_takes_its_time(clock: Clock) -> None:
    """What answers a request leaves in one piece, and nobody sees how the client gets on."""
    queue = make(event("huge", 640 * 1024), size=1000)
    queue.downloads(sum(item.size for item in queue.take(ALL)))
    queue.put(event("a", 1000))
    clock.now += 29.0
    assert not queue.is_slow(10.0, is_shared=False)
    clock.now += 2.0
    assert queue.is_slow(10.0, is_shared=False)


@pytest.mark.parametrize(
    "act", [lambda queue: queue.take(10), lambda queue: queue.clear(), lambda queue: queue.wake()]
)
def test_who_waits_for_room_is_woken(act: Any, runtime: Runtime) -> None:
    queue = make(event("a"), event("b"), size=10)
    queue.room = runtime.flag()
    act(queue)
    assert queue.room.is_set()


def test_one_message_larger_than_the_bound_passes_when_nothing_else_waits() -> None:
    queue = make(size=100)
    assert not queue.is_full
    queue.put(event("huge", 5000))
    assert queue.is_full
    assert names(queue.take(10)) == ["huge"]
    assert not queue.is_full


def test_who_must_be_heard_is_put_whatever_the_bounds() -> None:
    queue = make(event("a", 100), size=100, packets=1)
    queue.put(control("ack"))
    queue.put(control("close"))
    assert waiting(queue) == ["a", "ack", "close"]
    assert (len(queue), queue.size) == (3, 120)


def test_a_queue_that_is_cleared_tells_how_many_events_were_in_it() -> None:
    queue = make(event("a"), control("ack"), volatile("v"), event("b"))
    assert queue.clear() == 3
    assert (len(queue), queue.size) == (0, 0)
    assert queue.clear() == 0


def test_messages_of_the_server_fit() -> None:
    """Their bytes on the wire count, and what they cost besides."""
    messages = [
        ClientMessage.of_socketio(f'2["news",{number}]', is_event=True) for number in range(3)
    ]
    queue = make(size=ALL, policy=DROP_OLDEST)
    for message in messages:
        queue.put(message)
    assert queue.size == sum(message.size for message in messages)
    assert queue.size > sum(len(message.frames) for message in messages) > 0
    assert queue.take(messages[0].size * 2) == messages[:2]
    assert queue.clear() == 1


# What gives way


def test_a_client_that_is_to_be_disconnected_loses_nothing_before() -> None:
    queue = make(volatile("v"), event("a"), packets=2, policy=DISCONNECT)
    assert queue.make_room() is None
    assert waiting(queue) == ["v", "a"]
    assert queue.clear() == 2


@pytest.mark.parametrize("policy", [DROP_OLDEST, DROP_VOLATILE])
def test_nothing_gives_way_where_there_is_room(policy: SlowConsumer) -> None:
    queue = make(volatile("v"), volatile("w"), packets=3, policy=policy)
    assert queue.make_room() == 0
    assert waiting(queue) == ["v", "w"]


def test_the_oldest_event_gives_way() -> None:
    queue = make(event("a"), volatile("v"), event("c"), packets=3, policy=DROP_OLDEST)
    assert queue.make_room() == 1
    assert waiting(queue) == ["v", "c"]
    assert (len(queue), queue.size) == (2, 20)
    assert not queue.is_full


def test_only_events_give_way_and_the_rest_keeps_its_order() -> None:
    items = [control("connect"), event("a"), control("ack"), event("b"), control("ping")]
    queue = make(*items, event("c"), packets=5, policy=DROP_OLDEST)
    assert queue.make_room() == 2
    assert waiting(queue) == ["connect", "ack", "ping", "c"]


def test_as_many_give_way_as_the_bytes_take() -> None:
    queue = make(
        event("a", 10), control("ack", 10), event("b", 60), event("c", 30), policy=DROP_OLDEST
    )
    queue._max_bytes = 50
    assert queue.make_room() == 2
    assert waiting(queue) == ["ack", "c"]
    assert queue.size == 40


def test_both_bounds_are_kept() -> None:
    items = [event(str(number), 10) for number in range(6)]
    queue = make(*items, packets=3, size=50, policy=DROP_OLDEST)
    assert queue.make_room() == 4
    assert waiting(queue) == ["4", "5"]
    queue = make(*items, packets=6, size=30, policy=DROP_OLDEST)
    assert queue.make_room() == 4
    assert waiting(queue) == ["4", "5"]


def test_what_is_being_written_does_not_give_way() -> None:
    queue = make(event("a"), event("b"), event("c"), packets=2, policy=DROP_OLDEST)
    assert names(queue.take(10)) == ["a"]
    assert queue.make_room() == 1
    assert waiting(queue) == ["c"]
    assert (len(queue), queue.size) == (1, 10)


def test_only_the_volatile_gives_way_where_that_is_wanted() -> None:
    items = [event("a"), volatile("v"), control("ack"), volatile("w")]
    queue = make(*items, packets=4, policy=DROP_VOLATILE)
    assert queue.make_room() == 1
    assert waiting(queue) == ["a", "ack", "w"]


def test_a_volatile_message_that_is_no_event_does_not_give_way() -> None:
    odd = Item("odd", is_event=False, is_volatile=True)
    for policy in (DROP_OLDEST, DROP_VOLATILE):
        queue = make(odd, packets=1, policy=policy)
        assert queue.make_room() is None
        assert waiting(queue) == ["odd"]


@pytest.mark.parametrize(
    ("policy", "items"),
    [
        (DROP_VOLATILE, [event("a"), event("b")]),
        (DROP_OLDEST, [control("ack"), control("ping")]),
        (DROP_VOLATILE, [control("ack"), event("b")]),
    ],
)
def test_no_room_is_made_where_nothing_may_give_way(
    policy: SlowConsumer, items: list[Item]
) -> None:
    queue = make(*items, packets=2, policy=policy)
    assert queue.make_room() is None
    assert waiting(queue) == names(items)
    assert (len(queue), queue.size) == (2, 20)


@pytest.mark.parametrize(
    ("policy", "items"),
    [
        (DROP_OLDEST, [control("ack"), event("a"), control("ping"), event("b")]),
        (DROP_VOLATILE, [event("a"), volatile("v"), event("b"), volatile("w"), event("c")]),
    ],
)
def test_every_event_is_counted_also_when_too_few_give_way(
    policy: SlowConsumer, items: list[Item]
) -> None:
    """Its client is disconnected then, and what waited for it is counted by ``clear``."""
    queue = make(*items, packets=2, policy=policy)
    assert queue.make_room() is None
    assert queue.clear() == sum(item.is_event for item in items)


# Random walks

items = st.builds(
    Item,
    name=st.just(""),
    size=st.integers(min_value=1, max_value=40),
    is_event=st.booleans(),
    is_volatile=st.booleans(),
)


@given(
    st.lists(items, max_size=12),
    st.integers(min_value=0, max_value=200),
    st.integers(min_value=1, max_value=8),
    st.integers(min_value=1, max_value=120),
    st.sampled_from(SlowConsumer),
)
@settings(max_examples=examples(120), deadline=None)
def test_room_is_made_at_the_cost_of_the_oldest_and_of_no_more_than_it_takes(
    waits: list[Item], taken: int, packets: int, size: int, policy: SlowConsumer
) -> None:
    """Beside dropping one after the other by hand."""
    queue = make(*waits, packets=packets, size=size, policy=policy)
    if taken:
        queue.take(taken)
    before: list[Any] = list(queue._items)

    def is_full(kept: list[Any]) -> bool:
        return sum(item.size for item in kept) >= size or len(kept) >= packets

    kept = list(before)
    for item in before:
        if not is_full(kept) or policy is DISCONNECT:
            break
        if item.is_event and (policy is DROP_OLDEST or item.is_volatile):
            del kept[[id(each) for each in kept].index(id(item))]
    answer = queue.make_room()
    if policy is DISCONNECT or is_full(kept):
        assert answer is None
    else:
        assert answer == len(before) - len(kept)
        assert list(queue._items) == kept
        assert not queue.is_full


class QueueWalk(RuleBasedStateMachine):
    """Puts as the socket does, takes as the wire does, and follows by hand."""

    policy = DISCONNECT
    max_packets = 5
    max_bytes = 100

    def __init__(self) -> None:
        super().__init__()
        self.queue = make(packets=self.max_packets, size=self.max_bytes, policy=self.policy)
        self.number = 0
        self.waiting: list[Item] = []
        self.taken: list[Item] = []
        self.written: list[Item] = []
        self.events = 0
        self.lost = 0
        self.control_bytes = 0
        self.control_count = 0

    def _put(self, item: Item) -> None:
        self.queue.put(item)
        self.waiting.append(item)

    @rule(size=st.sampled_from([1, 10, 30, 99, 100, 500]), is_volatile=st.booleans())
    def put_event(self, size: int, is_volatile: bool) -> None:
        self.number += 1
        self.events += 1
        item = Item(str(self.number), size, is_volatile=is_volatile)
        if not self.queue.is_full:
            self._put(item)
            return
        before = list(self.waiting)
        dropped = self.queue.make_room()
        if dropped is None:
            # The client is disconnected.
            self.lost += self.queue.clear() + 1
            self.waiting = []
            return
        self.lost += dropped
        self.waiting = list(self.queue._items)  # type: ignore[arg-type]
        gone = [each for each in before if each not in self.waiting]
        assert len(gone) == dropped
        assert all(each.is_event for each in gone)
        assert self.policy is not DISCONNECT
        assert all(each.is_volatile for each in gone) or self.policy is DROP_OLDEST
        self._put(item)

    @rule(size=st.sampled_from([1, 10, 120]))
    def put_control(self, size: int) -> None:
        self.number += 1
        self._put(control(str(self.number), size))

    @rule(max_bytes=st.sampled_from([0, 1, 10, 50, 100, 1000]))
    def take(self, max_bytes: int) -> None:
        self.written += self.taken
        batch: list[Any] = self.queue.take(max_bytes)
        assert batch == self.waiting[: len(batch)]
        assert bool(batch) == bool(self.waiting)
        self.waiting = self.waiting[len(batch) :]
        self.taken = batch
        assert len(batch) <= 1 or sum(item.size for item in batch) <= max_bytes
        if self.waiting and batch:
            assert sum(item.size for item in [*batch, self.waiting[0]]) > max_bytes

    @rule()
    def write(self) -> None:
        self.written += self.taken
        self.taken = []

    @rule()
    def clear(self) -> None:
        cleared = self.queue.clear()
        assert cleared == sum(item.is_event for item in self.waiting)
        self.lost += cleared
        self.waiting = []

    @invariant()
    def the_books_are_right(self) -> None:
        size = sum(item.size for item in self.waiting)
        assert list(self.queue._items) == self.waiting
        assert len(self.queue) == len(self.waiting)
        assert self.queue.size == size
        is_full = size >= self.max_bytes or len(self.waiting) >= self.max_packets
        assert self.queue.is_full == is_full

    @invariant()
    def the_bounds_are_kept(self) -> None:
        """One message may go beyond them; what is no event is bounded by its sender."""
        events = [item for item in self.waiting if item.is_event]
        assert len(events) <= self.max_packets
        assert sum(item.size for item in events[:-1]) < self.max_bytes

    @invariant()
    def nothing_is_reordered_or_lost_uncounted(self) -> None:
        numbers = [int(item.name) for item in [*self.written, *self.taken, *self.waiting]]
        assert numbers == sorted(set(numbers))
        held = [item for item in [*self.written, *self.taken, *self.waiting] if item.is_event]
        assert len(held) + self.lost == self.events


class DroppingOldestWalk(QueueWalk):
    policy = DROP_OLDEST


class DroppingVolatileWalk(QueueWalk):
    policy = DROP_VOLATILE


TestQueueWalk = QueueWalk.TestCase
TestDroppingOldestWalk = DroppingOldestWalk.TestCase
TestDroppingVolatileWalk = DroppingVolatileWalk.TestCase
TestQueueWalk.settings = TestDroppingOldestWalk.settings = TestDroppingVolatileWalk.settings = (
    settings(
        max_examples=examples(25),
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
)


# Who writes, and when


@dataclass
class Writing:
    """A writer that notes its name, and does more if it is told to."""

    name: object
    log: list[object]
    then: Callable[[], object] = field(default=lambda: None)

    def flush(self) -> None:
        self.log.append(self.name)
        self.then()


def test_writers_are_flushed_in_the_order_in_which_they_came(runtime: Runtime) -> None:
    write_batcher = WriteBatcher(runtime)
    log: list[object] = []
    for number in range(1000):
        write_batcher.add(Writing(number, log))
    wait_for(runtime, lambda: len(log) >= 1000)
    assert log == list(range(1000))


def test_writers_are_flushed_in_the_next_turn(nothing_left_behind: None) -> None:
    """So that what is put in one go is written in one go."""
    runtime = GeventRuntime()
    write_batcher = WriteBatcher(runtime)
    log: list[object] = []
    for name in "ab":
        write_batcher.add(Writing(name, log))
    assert log == []
    runtime.sleep(0)
    assert log == ["a", "b"]


def test_others_have_their_turn_after_some_milliseconds(
    nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broadcast to thousands is no reason for a heartbeat, or an event, to be late."""
    now = 0.0

    def spend() -> None:
        nonlocal now
        now += 0.001

    monkeypatch.setattr(sending, "clock", lambda: now)
    runtime = GeventRuntime()
    write_batcher = WriteBatcher(runtime)
    log: list[object] = []
    with unit_support.busy_socket(lambda: log.append("other")):
        for number in range(100):
            write_batcher.add(Writing(number, log, then=spend))
        wait_for(runtime, lambda: log.count("other") <= len(log) - 100)
    assert [entry for entry in log if entry != "other"] == list(range(100))
    assert unit_support.longest_run_without(log, "other") <= 10


def test_what_is_added_during_a_flush_is_flushed_later(runtime: Runtime) -> None:
    write_batcher = WriteBatcher(runtime)
    log: list[object] = []
    late = Writing("late", log)
    write_batcher.add(Writing("first", log, then=lambda: write_batcher.add(late)))
    write_batcher.add(Writing("second", log))
    wait_for(runtime, lambda: "late" in log and "second" in log)
    assert log.index("first") < log.index("late")
    assert sorted(map(str, log)) == ["first", "late", "second"]


def test_what_is_added_during_a_flush_waits_for_the_next_turn(nothing_left_behind: None) -> None:
    """A writer that always has more to write keeps nobody waiting."""
    runtime = GeventRuntime()
    write_batcher = WriteBatcher(runtime)
    log: list[object] = []
    rounds = iter(range(5))

    def again() -> None:
        if next(rounds, None) is not None:
            write_batcher.add(greedy)
            runtime.call_soon(lambda: log.append("other"))

    greedy = Writing("greedy", log, then=again)
    write_batcher.add(greedy)
    write_batcher.add(Writing("modest", log))
    wait_for(runtime, lambda: len(log) == 12)
    assert log == ["greedy", "modest", *["other", "greedy"] * 5]


def test_a_flusher_that_was_idle_flushes_again(runtime: Runtime) -> None:
    write_batcher = WriteBatcher(runtime)
    log: list[object] = []
    for number in range(5):
        write_batcher.add(Writing(number, log))
        wait_for(runtime, lambda number=number: len(log) == number + 1)
    assert log == list(range(5))


def test_one_turn_of_the_loop_serves_all(nothing_left_behind: None) -> None:
    """A hundred clients that are written to are one call of the loop, not a hundred."""
    calls: list[object] = []

    class Counting(GeventRuntime):
        def call_soon(self, target: Callable[[], object]) -> None:
            calls.append(target)
            super().call_soon(target)

    runtime = Counting()
    write_batcher = WriteBatcher(runtime)
    log: list[object] = []
    for number in range(100):
        write_batcher.add(Writing(number, log))
    assert len(calls) == 1
    wait_for(runtime, lambda: len(log) == 100)
    assert len(calls) == 1


def test_a_writer_that_was_added_twice_is_flushed_twice(runtime: Runtime) -> None:
    """Who adds knows whether it is due already."""
    write_batcher = WriteBatcher(runtime)
    log: list[object] = []
    writer = Writing("a", log)
    write_batcher.add(writer)
    write_batcher.add(writer)
    wait_for(runtime, lambda: len(log) == 2)


class ByHand:
    """A runtime whose turns are taken by hand."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def call_soon(self, target: Callable[[], object]) -> None:
        self.calls.append(target)

    def call_later(self, delay: float, target: Callable[[], object]) -> None:
        self.calls.append(target)

    def loop_iteration(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def test_a_writer_that_fails_stops_no_other() -> None:
    """Spawn callbacks of gevent may raise anything where a writer is about to wait."""
    runtime: Any = ByHand()
    write_batcher = WriteBatcher(runtime)
    log: list[object] = []

    def fail() -> None:
        raise LookupError("a writer")

    write_batcher.add(Writing("failing", log, then=fail))
    write_batcher.add(Writing("behind it", log))
    with pytest.raises(LookupError):
        runtime.loop_iteration()
    runtime.loop_iteration()
    assert log == ["failing", "behind it"]
    write_batcher.add(Writing("later", log))
    runtime.loop_iteration()
    assert log == ["failing", "behind it", "later"]
