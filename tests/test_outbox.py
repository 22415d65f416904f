"""Messages on their way: bounded, in order, and every loss counted."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flask_socketio_guard.core.runtime import GeventRuntime, Runtime, ThreadRuntime, clock
from flask_socketio_guard.core.supervisor import Restart, RestartPolicy, Supervisor, TaskHandle
from flask_socketio_guard.errors import OutboxFull, PublishError, PublishRefused
from flask_socketio_guard.queue import outbox as outbox_module
from flask_socketio_guard.queue.outbox import Outbox
from flask_socketio_guard.queue.reachability import Reachability
from tests.support import unit_support
from tests.support.scale import examples
from tests.support.unit_support import FakeClock, FakePublisher, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime


@dataclass
class Box:
    """An outbox in front of a publisher that fails as it is told to."""

    runtime: Runtime
    max_messages: int = 100
    max_bytes: int = 10_000
    batch_messages: int = 512
    is_dropping_oldest: bool = False
    resubscribe_timeout: float = 60.0
    is_listening: bool = True
    lost: list[tuple[int, str, str]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    probes: list[int] = field(default_factory=list)
    changes: list[tuple[bool, str]] = field(default_factory=list)
    crashes: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.publisher = FakePublisher()
        self.broker = Reachability(
            lambda: None, on_change=lambda up, reason, _: self.changes.append((up, reason))
        )
        self.outbox = Outbox(
            self.runtime,
            self.publisher,
            self.broker,
            max_messages=self.max_messages,
            max_bytes=self.max_bytes,
            batch_messages=self.batch_messages,
            is_dropping_oldest=self.is_dropping_oldest,
            reconnect_max_delay=0.01,
            resubscribe_timeout=self.resubscribe_timeout,
            is_listening=lambda: self.is_listening,
            on_lost=lambda count, reason, detail: self.lost.append((count, reason, detail)),
            on_trouble=self.troubles.append,
            on_probe=self.probes.append,
        )
        self.writer: TaskHandle | None = None

    def start(self) -> None:
        supervisor = Supervisor(
            self.runtime,
            on_failure=lambda _, exc: self.crashes.append(exc),
            on_change=lambda *_: None,
        )
        self.writer = supervisor.watch(
            "writer",
            self.outbox.write,
            policy=RestartPolicy(Restart.NEVER),
            wake=self.outbox.wake,
        )

    def stop(self) -> None:
        if self.writer is not None:
            self.writer.stop()
            assert self.writer.join(5.0), "the writer does not stop"
        assert self.crashes == []

    def put(self, *payloads: str) -> None:
        for payload in payloads:
            self.outbox.put(payload.encode())

    def lose_the_broker(self) -> None:
        """Let everyone know that the broker is away, until it answers."""
        self.broker.report_lost("away")

    @property
    def taken(self) -> list[str]:
        return [message.payload.decode() for message in self.publisher.taken]

    @property
    def dropped(self) -> int:
        return sum(count for count, _, _ in self.lost)

    def wait_for(self, condition: Callable[[], object], message: str = "") -> None:
        wait_for(self.runtime, condition, message=message or "the condition did not come true")


@pytest.fixture
def make_box(runtime: Runtime) -> Iterator[Callable[..., Box]]:
    """Return a function that makes an outbox; its writer is stopped afterwards."""
    made: list[Box] = []

    def make(*, start: bool = True, **options: Any) -> Box:
        box = Box(runtime, **options)
        made.append(box)
        if start:
            box.start()
        return box

    yield make
    for box in made:
        box.stop()


@pytest.fixture
def box(make_box: Callable[..., Box]) -> Box:
    return make_box()


# Order and acknowledgement


def test_messages_go_out_in_order(box: Box) -> None:
    texts = [str(number) for number in range(50)]
    box.put(*texts)
    assert box.outbox.flush(5.0)
    assert box.taken == texts
    assert [message.sequence for message in box.publisher.taken] == list(range(1, 51))
    assert (len(box.outbox), box.outbox.size, box.outbox.fill) == (0, 0, 0.0)
    assert box.lost == []


def test_a_message_waits_until_it_is_acknowledged(box: Box) -> None:
    """What is on its way still counts against the bounds."""
    answer = box.runtime.flag()
    box.publisher.before_answer = answer.wait
    box.put("12345")
    box.wait_for(lambda: box.publisher.calls)
    assert (len(box.outbox), box.outbox.size) == (1, 5)
    assert not box.outbox.flush(0.01)
    answer.set()
    assert box.outbox.flush(5.0)
    assert (len(box.outbox), box.outbox.size) == (0, 0)


def test_what_was_not_acknowledged_is_sent_again_in_order(box: Box) -> None:
    """The connection breaks after 3 of 10."""
    hold = box.runtime.flag()
    box.publisher.before_answer = hold.wait
    box.publisher.script = [PublishError("reset by peer", published=3)]
    box.put("0")
    box.wait_for(lambda: box.publisher.calls)
    box.put(*[str(number) for number in range(1, 10)])
    box.publisher.script = [1, PublishError("reset by peer", published=3)]
    hold.set()
    assert box.outbox.flush(5.0)
    assert box.taken == [str(number) for number in range(10)]
    assert box.lost == []


def test_order_is_kept_over_many_failures(box: Box) -> None:
    box.publisher.script = [
        PublishError("broken", published=number % 3) if number % 2 else 2 for number in range(40)
    ]
    for number in range(60):
        box.put(str(number))
        box.runtime.sleep(0)
    assert box.outbox.flush(10.0)
    assert box.taken == [str(number) for number in range(60)]


def test_messages_may_go_out_one_by_one(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, batch_messages=1)
    box.put(*map(str, range(10)))
    box.start()
    box.wait_for(lambda: len(box.taken) == 10)
    assert box.taken == [str(number) for number in range(10)]
    assert max(len(numbers) for numbers, _ in box.publisher.calls) == 1


def test_messages_go_out_in_batches(make_box: Callable[..., Box]) -> None:
    """One round trip for many is what makes ``emit`` fast."""
    box = make_box(start=False, max_messages=10_000, max_bytes=10**8)
    box.put(*["x"] * 2000)
    box.start()
    assert box.outbox.flush(5.0)
    sizes = [len(numbers) for numbers, _ in box.publisher.calls]
    assert max(sizes) == 512
    assert len(sizes) <= 5


def test_a_batch_is_bounded_in_bytes(make_box: Callable[..., Box]) -> None:
    """It must fit the socket's buffer, or a broker that hangs holds it half sent."""
    box = make_box(start=False, max_messages=1000, max_bytes=10**8)
    box.put(*["x" * 60_000] * 12)
    box.start()
    assert box.outbox.flush(5.0)
    assert max(len(numbers) for numbers, _ in box.publisher.calls) == 3


def test_a_message_larger_than_a_batch_goes_out_alone(make_box: Callable[..., Box]) -> None:
    box = make_box(max_bytes=10**8)
    box.put("x" * 1_000_000)
    assert box.outbox.flush(5.0)
    assert len(box.taken[0]) == 1_000_000


def test_the_writer_sleeps_when_there_is_nothing_to_do(box: Box) -> None:
    box.put("x")
    assert box.outbox.flush(5.0)
    calls = len(box.publisher.calls)
    box.runtime.sleep(0.1)
    assert len(box.publisher.calls) == calls


def test_messages_put_by_native_threads_go_out_at_once(nothing_left_behind: None) -> None:
    """``emit`` in a thread pool, while the writer is a greenlet."""
    box = Box(GeventRuntime())
    box.start()
    box.runtime.sleep(0.02)
    thread = threading.Timer(0.02, box.put, args=["from a thread"])
    thread.start()
    began_at = clock()
    box.wait_for(lambda: box.taken)
    assert clock() - began_at < 2.0
    thread.join()
    box.stop()


def test_many_writers_lose_nothing(nothing_left_behind: None) -> None:
    """Real threads put at once; each one's messages stay in their order."""
    box = Box(ThreadRuntime(), max_messages=10_000, max_bytes=10**8)
    box.publisher.script = [PublishError("broken", published=1), 2, PublishError("broken")] * 5
    box.start()

    def put_many(name: str) -> None:
        for number in range(200):
            box.put(f"{name}-{number}")

    threads = [threading.Thread(target=put_many, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert box.outbox.flush(10.0)
    assert len(box.taken) == 1200
    assert [message.sequence for message in box.publisher.taken] == list(range(1, 1201))
    for name in "abcdef":
        own = [text for text in box.taken if text.startswith(name)]
        assert own == [f"{name}-{number}" for number in range(200)]
    box.stop()


# Bounds


def test_the_newest_message_is_refused_at_the_bound(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, max_messages=3)
    box.lose_the_broker()
    box.put("a", "b", "c")
    with pytest.raises(OutboxFull) as caught:
        box.put("d")
    assert (caught.value.messages, caught.value.size) == (3, 3)
    assert str(caught.value) == (
        "the outbox is full (3 messages, 3 bytes wait for the message queue)"
    )
    assert box.lost == [(1, "overflow", "")]
    box.start()
    assert box.outbox.flush(5.0)
    assert box.taken == ["a", "b", "c"]
    box.put("e")
    assert box.outbox.flush(5.0)


def test_the_bound_in_bytes_holds(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, max_bytes=10)
    box.lose_the_broker()
    box.put("12345", "1234")
    with pytest.raises(OutboxFull):
        box.put("12")
    box.put("1")
    assert (len(box.outbox), box.outbox.size) == (3, 10)
    assert box.dropped == 1


def test_a_refused_message_leaves_no_gap_in_the_sequence(make_box: Callable[..., Box]) -> None:
    """Peers would take it for a message on its way."""
    box = make_box(start=False, max_messages=1)
    box.lose_the_broker()
    box.put("a")
    with pytest.raises(OutboxFull):
        box.put("refused")
    box.start()
    assert box.outbox.flush(5.0)
    box.put("b")
    assert box.outbox.flush(5.0)
    assert [message.sequence for message in box.publisher.taken] == [1, 2]


def test_the_oldest_messages_are_dropped_at_the_bound(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, max_messages=3, is_dropping_oldest=True)
    box.lose_the_broker()
    box.put("a", "b", "c", "d", "e")
    assert box.lost == [(1, "overflow", ""), (1, "overflow", "")]
    box.start()
    assert box.outbox.flush(5.0)
    assert box.taken == ["c", "d", "e"]


def test_as_many_are_dropped_as_a_large_message_needs(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, max_bytes=10, is_dropping_oldest=True)
    box.lose_the_broker()
    box.put("1234", "12", "123", "1234567")
    assert box.lost == [(2, "overflow", "")]
    assert (len(box.outbox), box.outbox.size) == (2, 10)
    box.start()
    assert box.outbox.flush(5.0)
    assert box.taken == ["123", "1234567"]


def test_a_message_that_can_never_fit_drops_no_others(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, max_bytes=10, is_dropping_oldest=True)
    box.lose_the_broker()
    box.put("a", "b")
    with pytest.raises(OutboxFull):
        box.put("12345678901")
    assert box.lost == [(1, "overflow", "")]
    box.start()
    assert box.outbox.flush(5.0)
    assert box.taken == ["a", "b"]


@pytest.mark.parametrize("max_messages", [2, 10, 600])
def test_dropping_the_oldest_never_refuses_while_a_batch_is_on_its_way(
    make_box: Callable[..., Box], max_messages: int
) -> None:
    """The broker hangs with a whole batch in flight."""
    box = make_box(start=False, max_messages=max_messages, is_dropping_oldest=True)
    answer = box.runtime.flag()
    box.publisher.before_answer = answer.wait
    box.put(*[str(number) for number in range(max_messages)])
    box.start()
    box.wait_for(lambda: box.publisher.calls)
    for number in range(2 * max_messages):
        box.put(f"newer-{number}")
    assert len(box.outbox) <= max_messages
    answer.set()
    assert box.outbox.flush(5.0)
    assert box.taken[-1] == f"newer-{2 * max_messages - 1}"
    assert len(box.taken) + box.dropped == 3 * max_messages


def test_the_fill_is_the_fuller_of_messages_and_bytes(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, max_messages=10, max_bytes=100)
    box.lose_the_broker()
    box.put("x" * 20)
    assert box.outbox.fill == 0.2
    box.put("", "", "", "")
    assert box.outbox.fill == 0.5


# Emitting faster than the writer writes


@pytest.mark.parametrize("has_paused", [False, True], ids=["at-once", "after-a-pause"])
def test_a_loop_of_emits_is_not_refused_while_the_broker_is_well(
    make_box: Callable[..., Box], has_paused: bool
) -> None:
    """Under gevent such a loop would otherwise never let the writer run."""
    box = make_box(max_messages=1000, max_bytes=10**8)
    box.put("first")
    assert box.outbox.flush(5.0)
    if has_paused:
        box.runtime.sleep(0.8)
    box.put(*[str(number) for number in range(5000)])
    assert box.outbox.flush(10.0)
    assert box.taken[1:] == [str(number) for number in range(5000)]
    assert box.lost == []


def test_a_process_that_stood_still_asks_the_writer_before_it_refuses(
    make_box: Callable[..., Box], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has heard nothing of the broker, and yet the broker is well."""
    box = make_box(max_messages=100, max_bytes=10**8)
    give_turn = box.runtime.yield_control

    def give_turn_to_writer() -> None:
        give_turn()  # which, with threads, the writer is free not to take
        wait_for(box.runtime, lambda: len(box.outbox) < 100)

    monkeypatch.setattr(box.runtime, "yield_control", give_turn_to_writer)
    box.put("first")
    assert box.outbox.flush(5.0)
    box.put(*[str(number) for number in range(100)])
    box.outbox._acknowledged_at -= 10.0
    box.put("last")
    assert box.outbox.flush(10.0)
    assert box.taken == ["first", *[str(number) for number in range(100)], "last"]
    assert box.lost == []


def test_a_loop_of_emits_waits_for_room_while_the_writer_gets_on(
    make_box: Callable[..., Box],
) -> None:
    """The broker takes its time, but it takes what it gets."""
    box = make_box(max_messages=100, max_bytes=10**8)
    box.publisher.before_answer = lambda: box.runtime.sleep(0.01)
    box.put(*[str(number) for number in range(1000)])
    assert box.outbox.flush(10.0)
    assert box.taken == [str(number) for number in range(1000)]
    assert box.lost == []


def test_a_loop_of_emits_gives_way_before_the_outbox_is_full(nothing_left_behind: None) -> None:
    """Else everything would go out in one burst at its end."""
    box = Box(GeventRuntime(), max_messages=100_000, max_bytes=10**8)
    box.start()
    box.put(*["x"] * 1000)
    assert len(box.taken) >= 256
    box.stop()


def test_nobody_waits_for_a_broker_that_is_away(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, max_messages=3)
    box.lose_the_broker()
    began_at = clock()
    box.put("a", "b", "c")
    for _ in range(20):
        with pytest.raises(OutboxFull):
            box.put("d")
    assert clock() - began_at < 0.3


def test_nobody_waits_long_for_a_broker_that_hangs(make_box: Callable[..., Box]) -> None:
    """Once the silence is too long nobody waits any more."""
    box = make_box(max_messages=4)
    answer = box.runtime.flag()
    box.publisher.before_answer = answer.wait
    box.put("a", "b", "c", "d")
    began_at = clock()
    with pytest.raises(OutboxFull):
        box.put("e")
    assert clock() - began_at < 2.0
    began_at = clock()
    for _ in range(20):
        with pytest.raises(OutboxFull):
            box.put("f")
    assert clock() - began_at < 0.3
    answer.set()
    assert box.outbox.flush(5.0)
    assert box.taken == ["a", "b", "c", "d"]


def test_a_closed_outbox_holds_up_nobody(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, max_messages=2)
    box.put("a", "b")
    box.outbox.close()
    began_at = clock()
    box.put(*["late"] * 20)
    assert clock() - began_at < 0.3
    assert box.dropped == 22


def test_the_event_loop_itself_never_waits_for_room(nothing_left_behind: None) -> None:
    """A callback of gevent's hub may emit; nothing may block there."""
    import gevent

    box = Box(GeventRuntime(), max_messages=2)
    box.put("a", "b")
    outcome: list[object] = []

    def emit() -> None:
        try:
            box.put("c")
        except BaseException as exc:
            outcome.append(type(exc))

    gevent.get_hub().loop.run_callback(emit)
    box.wait_for(lambda: outcome)
    assert outcome == [OutboxFull]


# The broker's answers


def test_a_refused_message_is_counted_and_not_sent_again(box: Box) -> None:
    """The broker is there, and says no: to try again would hold up the rest for ever."""
    hold = box.runtime.flag()
    box.publisher.before_answer = hold.wait
    box.publisher.script = [PublishRefused("NOPERM", published=0, refused=1)]
    box.put("forbidden")
    box.wait_for(lambda: box.publisher.calls)
    box.put("allowed")
    hold.set()
    assert box.outbox.flush(5.0)
    assert box.taken == ["allowed"]
    assert box.lost == [(1, "refused", "NOPERM")]
    assert box.broker.is_reachable
    assert box.changes == []


def test_an_idle_connection_that_broke_is_no_loss_of_the_broker(box: Box) -> None:
    """The second attempt succeeds at once; nobody needs to be alarmed."""
    box.publisher.script = [PublishError("broken pipe")]
    box.put("x")
    assert box.outbox.flush(5.0)
    assert box.taken == ["x"]
    assert box.changes == []


def test_a_broker_that_stays_away_is_reported_with_its_reason_and_its_return(box: Box) -> None:
    box.publisher.is_down = True
    box.put("x")
    box.wait_for(lambda: box.changes)
    assert box.changes == [(False, "the broker is down")]
    box.runtime.sleep(0.05)
    assert len(box.changes) == 1
    box.publisher.is_down = False
    assert box.outbox.flush(5.0)
    assert box.changes[1:] == [(True, "")]


# The gate


def outage(box: Box) -> None:
    """Let the usual two subscribers be known, then lose the connection."""
    box.put("before")
    assert box.outbox.flush(5.0)
    box.publisher.subscribers = 0
    box.publisher.script = [PublishError("broken")]
    box.put("first", "second")


def test_nothing_goes_out_until_the_usual_subscribers_are_back(box: Box) -> None:
    """In pub/sub, what is published before they are back is lost."""
    outage(box)
    box.wait_for(lambda: len(box.publisher.calls) >= 5)
    assert box.taken == ["before"]
    box.publisher.subscribers = 1
    calls = len(box.publisher.calls)
    box.wait_for(lambda: len(box.publisher.calls) >= calls + 3)
    assert box.taken == ["before"]
    box.publisher.subscribers = 2
    assert box.outbox.flush(5.0)
    assert box.taken == ["before", "first", "second"]


def test_nothing_goes_out_until_this_process_listens_again(box: Box) -> None:
    box.is_listening = False
    outage(box)
    box.publisher.subscribers = 2
    box.wait_for(lambda: len(box.publisher.calls) >= 5)
    assert box.taken == ["before"]
    box.is_listening = True
    assert box.outbox.flush(5.0)


def test_the_gate_opens_when_the_time_is_over(make_box: Callable[..., Box]) -> None:
    """A process that was scaled away never comes back."""
    box = make_box(resubscribe_timeout=0.2)
    outage(box)
    began_at = clock()
    assert box.outbox.flush(5.0)
    assert 0.15 <= clock() - began_at < 2.0
    assert box.taken == ["before", "first", "second"]


def test_the_time_of_the_gate_begins_when_the_broker_is_back(
    make_box: Callable[..., Box],
) -> None:
    """Not when it went away, or a long outage would use it up."""
    box = make_box(resubscribe_timeout=0.3)
    outage(box)
    box.publisher.is_down = True
    box.runtime.sleep(0.5)
    box.publisher.is_down = False
    assert not box.outbox.flush(0.1)
    assert box.outbox.flush(5.0)


def test_a_gate_without_a_count_waits_for_this_process_only(box: Box) -> None:
    """An access list may forbid to count subscribers."""
    box.is_listening = False
    outage(box)
    box.publisher.subscribers = None
    box.runtime.sleep(0.05)
    assert box.taken == ["before"]
    box.is_listening = True
    assert box.outbox.flush(5.0)


def test_a_second_outage_closes_the_gate_again(box: Box) -> None:
    outage(box)
    box.publisher.subscribers = 2
    assert box.outbox.flush(5.0)
    box.publisher.subscribers = 0
    box.publisher.script = [PublishError("broken")]
    box.put("third")
    box.wait_for(lambda: len(box.publisher.calls) >= 8)
    assert box.taken[-1] == "second"
    box.publisher.subscribers = 2
    assert box.outbox.flush(5.0)


# Probes


def test_a_probe_goes_before_what_waits(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False, max_messages=10_000, max_bytes=10**8)
    box.put(*["x"] * 2000)
    box.outbox.put_probe(7)
    box.start()
    box.wait_for(lambda: box.probes)
    assert box.publisher.calls[0][1] == 7
    assert box.probes == [7]


def test_a_probe_goes_out_without_any_message(box: Box) -> None:
    box.outbox.put_probe(1)
    box.wait_for(lambda: box.probes == [1])
    assert box.publisher.calls == [([], 1)]


def test_a_probe_passes_the_closed_gate(box: Box) -> None:
    """It is what tells that this process listens again."""
    outage(box)
    box.outbox.put_probe(5)
    box.wait_for(lambda: box.probes == [5])
    assert box.taken == ["before"]
    box.publisher.subscribers = 2


def test_a_probe_that_did_not_get_out_is_sent_again(box: Box) -> None:
    box.publisher.script = [PublishError("broken"), PublishError("broken")]
    box.outbox.put_probe(3)
    box.wait_for(lambda: box.probes)
    assert box.probes == [3]


def test_a_newer_probe_replaces_one_that_waits(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False)
    box.outbox.put_probe(1)
    box.outbox.put_probe(2)
    box.start()
    box.wait_for(lambda: box.probes)
    box.runtime.sleep(0.02)
    assert box.probes == [2]


def test_a_newer_probe_is_not_replaced_by_the_failed_one(box: Box) -> None:
    hold = box.runtime.flag()
    box.publisher.before_answer = hold.wait
    box.publisher.script = [PublishError("broken")]
    box.outbox.put_probe(1)
    box.wait_for(lambda: box.publisher.calls)
    box.outbox.put_probe(2)
    hold.set()
    box.wait_for(lambda: box.probes)
    assert box.probes == [2]


# Flush, stop and close


def test_a_flush_of_an_empty_outbox_returns_at_once(make_box: Callable[..., Box]) -> None:
    assert make_box(start=False).outbox.flush(0.0)


def test_a_flush_gives_up_after_its_timeout(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False)
    box.put("x")
    began_at = clock()
    assert not box.outbox.flush(0.05)
    assert 0.04 <= clock() - began_at < 1.0


def test_a_writer_that_waits_for_the_broker_stops_at_once(box: Box) -> None:
    box.publisher.is_down = True
    box.put("x")
    box.wait_for(lambda: box.changes)
    box.stop()
    assert box.publisher.closed >= 1
    assert len(box.outbox) == 1


def test_a_closed_outbox_counts_what_it_drops_and_what_comes_later(
    make_box: Callable[..., Box],
) -> None:
    """Each message once, however often it is closed."""
    box = make_box(start=False)
    box.put("a", "b")
    box.outbox.close()
    box.outbox.close()
    assert box.lost == [(2, "exit", "")]
    assert (len(box.outbox), box.outbox.size) == (0, 0)
    assert box.outbox.flush(0.0)
    box.put("late")
    assert box.lost[1:] == [(1, "exit", "")]
    assert len(box.outbox) == 0


def test_an_outbox_that_is_closed_while_a_batch_is_on_its_way_counts_right(box: Box) -> None:
    """The answer to what was given up may still come."""
    answer = box.runtime.flag()
    box.publisher.before_answer = answer.wait
    box.put("a")
    box.wait_for(lambda: box.publisher.calls)
    box.outbox.close()
    answer.set()
    box.runtime.sleep(0.02)
    assert (len(box.outbox), box.outbox.size) == (0, 0)
    assert box.lost == [(1, "exit", "")]


# Random walks


class OutboxWalk(RuleBasedStateMachine):
    """Puts, acknowledges, fails, refuses and closes the gate, step by step."""

    max_messages = 8
    max_bytes = 40
    is_dropping_oldest = False

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(outbox_module, "clock", self.clock)
        self.patch.setattr(outbox_module, "sleep", lambda *_: True)
        self.box = Box(
            ThreadRuntime(),
            max_messages=self.max_messages,
            max_bytes=self.max_bytes,
            is_dropping_oldest=self.is_dropping_oldest,
            resubscribe_timeout=3.0,
        )
        # Whoever waits for room waits in the fake time.
        self.box.runtime.sleep = lambda seconds: self.clock.advance(max(seconds, 0.01))  # type: ignore[method-assign]
        self.number = 0
        self.refused = 0
        self.put_count = 0
        self.failures = 0

    def teardown(self) -> None:
        self.box.publisher.script = []
        self.box.publisher.is_down = False
        for _ in range(100):
            if not len(self.box.outbox):
                break
            self.clock.advance(1.0)
            self.box.outbox._publish_once()
        self.all_is_accounted_for()
        assert len(self.box.outbox) == 0
        assert self.box.outbox.flush(0.0)
        self.patch.undo()

    @rule(length=st.integers(min_value=4, max_value=30))
    def put(self, length: int) -> None:
        self.number += 1
        self.put_count += 1
        before = len(self.box.outbox)
        try:
            self.box.put(f"{self.number:04d}".ljust(length, "."))
        except OutboxFull:
            self.refused += 1
            assert not self.is_dropping_oldest
            assert before > 0

    @rule(subscribers=st.sampled_from([None, 0, 1, 2]))
    def acknowledge(self, subscribers: int | None) -> None:
        self.box.publisher.script = [subscribers]
        self.write()

    @rule(published=st.integers(min_value=0, max_value=8))
    def lose_the_connection(self, published: int) -> None:
        waiting = len(self.box.outbox)
        is_open = self.box.outbox._gate_deadline is None
        published = min(published, waiting, 4) if is_open else 0
        self.box.publisher.script = [PublishError("broken", published=published)]
        self.write()

    @rule()
    def refuse(self) -> None:
        self.box.publisher.before_answer = self._refuse_all
        self.write()
        self.box.publisher.before_answer = lambda: None

    def _refuse_all(self) -> None:
        count = len(self.box.publisher.calls[-1][0])
        if count:
            self.box.publisher.script = [PublishRefused("NOPERM", published=0, refused=count)]

    @rule(seconds=st.sampled_from([0.5, 4.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(is_listening=st.booleans())
    def listen(self, is_listening: bool) -> None:
        self.box.is_listening = is_listening

    def write(self) -> None:
        """One turn of the writer's loop."""
        try:
            self.box.outbox._publish_once()
            self.failures = 0
        except PublishError as exc:
            self.box.outbox._connection_lost(exc, self.failures)
            self.failures += 1
        self.box.publisher.script = []

    @invariant()
    def all_is_accounted_for(self) -> None:
        outbox = self.box.outbox
        assert len(self.box.taken) + len(outbox) + self.box.dropped == self.put_count
        assert len(outbox) <= self.max_messages
        assert outbox.size <= self.max_bytes
        waiting = [*outbox._in_flight, *outbox._waiting]
        assert outbox.size == sum(len(message.payload) for message in waiting)

    @invariant()
    def nothing_is_reordered_or_doubled(self) -> None:
        sequences = [message.sequence for message in self.box.publisher.taken]
        sequences += [
            message.sequence for message in [*self.box.outbox._in_flight, *self.box.outbox._waiting]
        ]
        assert sequences == sorted(set(sequences))
        numbers = [int(text[:4]) for text in self.box.taken]
        assert numbers == sorted(set(numbers))


class DroppingOutboxWalk(OutboxWalk):
    is_dropping_oldest = True


TestOutboxWalk = OutboxWalk.TestCase
TestDroppingOutboxWalk = DroppingOutboxWalk.TestCase
TestOutboxWalk.settings = TestDroppingOutboxWalk.settings = settings(
    max_examples=examples(40),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_what_may_not_be_published_is_kept_until_it_may(make_box: Callable[..., Box]) -> None:
    """Nothing is wrong with the messages, nor with the connection."""
    box = make_box(start=False)
    refused = PublishError("no permission", category="permission")
    box.publisher.script = [refused, refused, refused, None]
    box.outbox.put(b"1")
    box.outbox.put(b"2")
    began_at = clock()
    assert not box.outbox.settle(0.0)
    box.start()
    assert box.outbox.flush(5.0)
    assert clock() - began_at < 5.0
    assert [message.payload for message in box.publisher.taken] == [b"1", b"2"]
    assert box.troubles == ["no permission", ""]
    assert box.changes == []
    assert box.outbox.trouble == ""
    assert box.lost == []


@pytest.mark.parametrize("bound", [{"max_messages": 3}, {"max_bytes": 3}], ids=str)
def test_nothing_is_refused_because_it_may_not_be_published(
    make_box: Callable[..., Box], bound: dict[str, int]
) -> None:
    """Clients of this process are to get it: the oldest go, and are counted."""
    box = make_box(start=False, **bound)
    box.outbox.trouble = "permission"
    for number in range(5):
        box.outbox.put(b"%d" % number)
    assert len(box.outbox) == 3
    assert box.lost == [(1, "overflow", "")] * 2
    box.outbox.put(b"too large" * 100)  # for a bound in bytes
    box.start()
    assert box.outbox.flush(5.0)
    kept = ["2", "3", "4"] if "max_bytes" in bound else ["3", "4", "too large" * 100]
    assert box.taken == kept
    assert box.lost == [(1, "overflow", "")] * 3


def test_nobody_waits_for_what_may_not_be_published(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False)
    box.outbox.trouble = "permission"
    box.outbox.put(b"1")
    began_at = clock()
    assert not box.outbox.settle(30.0)
    assert clock() - began_at < 10.0


def test_nobody_waits_for_a_broker_that_is_known_to_be_away(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False)
    box.outbox.put(b"1")
    box.broker.report_lost("refused")
    began_at = clock()
    assert not box.outbox.settle(30.0)
    assert clock() - began_at < 10.0


def test_who_waits_for_the_broker_waits_for_an_answer(make_box: Callable[..., Box]) -> None:
    box = make_box(start=False)
    box.outbox.put(b"1")
    box.start()
    assert box.outbox.settle(5.0)
    assert len(box.publisher.taken) == 1


def test_what_a_forked_child_abandons_is_not_its_to_tell_of(make_box: Callable[..., Box]) -> None:
    """The parent will publish it, over a connection that is the parent's."""
    box = make_box(start=False)
    box.put("1", "2")
    box.outbox.abandon()
    assert len(box.outbox) == 0
    assert box.publisher.closed == 1
    assert box.lost == []
