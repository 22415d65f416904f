"""Acknowledgement callbacks: each is called once, lost once, or both never."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flask_socketio_guard.core.runtime import GeventRuntime, Runtime, clock
from flask_socketio_guard.core.supervisor import Restart, RestartPolicy, Supervisor, TaskHandle
from flask_socketio_guard.events import callbacks as callbacks_module
from flask_socketio_guard.events.acknowledgements import AckCallback
from flask_socketio_guard.events.callbacks import CallbackTable
from tests.support import unit_support
from tests.support.scale import examples
from tests.support.unit_support import FakeClock, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime


@dataclass
class Table:
    """A table that runs callbacks at once and remembers what was lost."""

    runtime: Runtime
    timeout: float = 60.0
    ran: list[tuple[Any, tuple[object, ...]]] = field(default_factory=list)
    lost: list[tuple[str, object]] = field(default_factory=list)
    answers: list[tuple[object, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = CallbackTable(
            self.runtime,
            timeout=self.timeout,
            run=self._run,
            on_lost=lambda reason, recipient: self.lost.append((reason, recipient)),
        )

    def _run(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self.ran.append((function, arguments))
        function(*arguments)

    def add(self, recipient: object = "sid", timeout: float | None = None, **options: Any) -> int:
        callback = AckCallback(lambda *args: self.answers.append(args), timeout, **options)
        return self.table.add(recipient, callback)


@pytest.fixture
def clean(runtime: Runtime) -> Table:
    return Table(runtime)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(callbacks_module, "clock", fake)
    return fake


def is_empty(table: CallbackTable) -> bool:
    return not (len(table) or table._queues or table._by_recipient)


def test_two_processes_do_not_ask_under_the_same_ids(runtime: Runtime) -> None:
    """A client in JavaScript may answer one of them with the id of the other's question."""
    ids = set()
    for _ in range(20):
        table = CallbackTable(runtime, timeout=1.0, run=lambda *_: None, on_lost=lambda *_: None)
        ids.add(table.add("sid", AckCallback(print)))
    assert len(ids) == 20
    assert max(ids) < 2**53, "the largest that JavaScript can count to"


def test_an_answer_calls_its_callback_once(clean: Table) -> None:
    ack_id = clean.add()
    assert len(clean.table) == 1
    assert clean.table.resolve(ack_id, "sid", ("a", 1))
    assert not clean.table.resolve(ack_id, "sid", ("b",))
    assert clean.answers == [("a", 1)]
    assert [arguments for _, arguments in clean.ran] == [("a", 1)]
    assert is_empty(clean.table)
    assert clean.lost == []


def test_ids_are_unique_over_recipients_and_never_used_again(clean: Table) -> None:
    """Upstream numbers each client from 1, and so one client's id fits another's callback."""
    ids = [clean.add(f"sid-{number % 3}") for number in range(30)]
    for ack_id in ids:
        clean.table.discard(ack_id, "sid-0")
    ids += [clean.add() for _ in range(30)]
    assert len(set(ids)) == 60
    assert min(ids) >= 1


def test_many_who_ask_at_once_get_ids_of_their_own(clean: Table) -> None:
    ids: list[int] = []
    jobs = [
        clean.runtime.spawn(
            lambda: ids.extend(clean.add(f"sid-{threading.get_ident()}") for _ in range(200)),
            name="asking",
        )
        for _ in range(8)
    ]
    assert all(job.join(10.0) for job in jobs)
    assert len(set(ids)) == len(clean.table) == 1600


@pytest.mark.parametrize("recipient", ["other", "", None, 5, ["sid"], ("sid",), {"sid": 1}])
def test_an_answer_counts_only_from_the_right_recipient(clean: Table, recipient: object) -> None:
    ack_id = clean.add("sid")
    assert not clean.table.resolve(ack_id, recipient, ("forged",))
    assert clean.answers == []
    assert clean.table.resolve(ack_id, "sid", ("true",))


@pytest.mark.parametrize(
    "ack_id", [0, -1, 2, 10**30, "1", None, 1.0, [1], {"a": 1}, b"1", (1,), float("nan")]
)
def test_an_id_that_a_client_made_up_is_ignored(clean: Table, ack_id: object) -> None:
    clean.add("sid")
    assert not clean.table.resolve(ack_id, "sid", ())
    assert len(clean.table) == 1


def test_a_list_of_rooms_may_be_a_recipient(clean: Table) -> None:
    """``emit(to=["a", "b"], callback=...)``."""
    ack_id = clean.add(["a", "b"])
    assert clean.table.resolve(ack_id, ["a", "b"], ("x",))
    assert is_empty(clean.table)


def test_a_callback_expires_at_its_deadline(clean: Table, fake_clock: FakeClock) -> None:
    clean.add(timeout=2.0)
    assert clean.table.expire() == 2.0
    fake_clock.advance(1.5)
    assert clean.table.expire() == 0.5
    fake_clock.advance(0.5)
    assert clean.table.expire() is None
    assert clean.lost == [("expired", "sid")]
    assert is_empty(clean.table)


def test_a_callback_without_a_timeout_takes_the_default(
    runtime: Runtime, fake_clock: FakeClock
) -> None:
    table = Table(runtime, timeout=7.0)
    table.add()
    assert table.table.expire() == 7.0


def test_many_different_timeouts_expire_each_in_its_time(
    clean: Table, fake_clock: FakeClock
) -> None:
    """1,000 callbacks with 100 timeouts, the longest first."""
    for number in range(1000):
        timeout = 100.0 - number % 100
        clean.add(f"{timeout:g}", timeout=timeout)
    for seconds in range(1, 101):
        fake_clock.advance(1.0)
        clean.table.expire()
        assert len(clean.lost) == 10 * seconds
        assert {recipient for _, recipient in clean.lost[-10:]} == {str(seconds)}
    assert is_empty(clean.table)


def lines_of(call: Callable[[], object]) -> int:
    """Count the lines of Python that a call runs through."""
    count = 0

    def trace(*_: object) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_a_look_costs_the_same_however_many_lengths_of_timeout_there_are(
    clean: Table, fake_clock: FakeClock
) -> None:
    few = Table(clean.runtime, timeout=1.0)
    few.add(timeout=50.0)
    for number in range(5000):
        clean.add(timeout=50.0 + number / 1000)
    clean.table.expire(), few.table.expire()
    assert lines_of(clean.table.expire) == lines_of(few.table.expire) < 40
    clean.table.lose_all("stopped")


def test_lengths_that_are_used_once_leave_nothing_behind(
    clean: Table, fake_clock: FakeClock
) -> None:
    for number in range(20_000):
        clean.table.resolve(clean.add(timeout=100.0 + number), "sid", ())
    assert len(clean.table._heads) == len(clean.table._planned) < 1100
    assert clean.table.expire() is None
    assert clean.table._heads == []
    clean.add(timeout=100.0)
    assert clean.table.expire() == 100.0
    clean.table.lose_all("stopped")


def test_answered_callbacks_leave_nothing_for_the_sweeper(
    clean: Table, fake_clock: FakeClock
) -> None:
    for number in range(100):
        ack_id = clean.add(timeout=1.0 + number)
        clean.table.resolve(ack_id, "sid", ())
    assert is_empty(clean.table)
    assert clean.table.expire() is None
    assert clean.lost == []


def test_whoever_is_gone_loses_all_callbacks_and_nobody_else_does(clean: Table) -> None:
    for _ in range(3):
        clean.add("gone")
    kept = clean.add("here")
    clean.table.lose_recipient("gone", "gone")
    clean.table.lose_recipient("gone", "gone")
    clean.table.lose_recipient("never seen", "gone")
    assert clean.lost == [("gone", "gone")] * 3
    assert clean.answers == []
    assert clean.table.resolve(kept, "here", ())
    assert is_empty(clean.table)


def test_a_loss_is_told_to_whoever_waits(clean: Table) -> None:
    """In a task of its own, as the callback itself would be."""
    told: list[str] = []
    ack_id = clean.add(on_lost=told.append)
    assert clean.table.lose(ack_id, "sid", "gone")
    assert not clean.table.lose(ack_id, "sid", "gone")
    assert told == ["gone"]
    assert [arguments for _, arguments in clean.ran] == [("gone",)]


def test_a_loss_for_the_wrong_recipient_is_none(clean: Table) -> None:
    clean.add("sid")
    assert not clean.table.lose(1, "other", "gone")
    assert len(clean.table) == 1


def test_a_discarded_callback_was_never_asked_and_is_no_loss(clean: Table) -> None:
    told: list[str] = []
    ack_id = clean.add(on_lost=told.append)
    clean.table.discard(ack_id, "sid")
    assert (told, clean.lost) == ([], [])
    assert is_empty(clean.table)


def test_a_stop_loses_every_callback(clean: Table) -> None:
    told: list[str] = []
    for number in range(5):
        clean.add(f"sid-{number % 2}", timeout=1.0 + number, on_lost=told.append)
    clean.table.lose_all("stopped")
    assert told == ["stopped"] * 5
    assert is_empty(clean.table)


def test_a_callback_of_the_guard_needs_no_task_and_is_not_counted(clean: Table) -> None:
    """As that of ``call()``, which only sets an event."""
    told: list[str] = []
    answered, lost = clean.add(is_inline=True), clean.add(is_inline=True, on_lost=told.append)
    clean.table.resolve(answered, "sid", ("x",))
    clean.table.lose(lost, "sid", "expired")
    assert clean.answers == [("x",)]
    assert told == ["expired"]
    assert clean.ran == []
    assert clean.lost == []


def test_a_callback_of_the_guard_that_raises_leaves_the_table_clean(clean: Table) -> None:
    """The guard's own code is not caught: whoever hands in the answer has to know."""

    def fail(*args: object) -> None:
        raise RuntimeError(*args)

    callback = AckCallback(fail, is_inline=True, on_lost=fail)
    answered, lost = clean.table.add("sid", callback), clean.table.add("sid", callback)
    bystander = clean.add("sid")
    with pytest.raises(RuntimeError, match="answer"):
        clean.table.resolve(answered, "sid", ("answer",))
    with pytest.raises(RuntimeError, match="expired"):
        clean.table.lose(lost, "sid", "expired")
    assert not clean.table.resolve(answered, "sid", ("answer",))
    assert not clean.table.lose(lost, "sid", "expired")
    assert clean.ran == []
    assert len(clean.table) == 1
    assert clean.table.resolve(bystander, "sid", ("x",))
    assert is_empty(clean.table)


def test_a_callback_may_ask_again(clean: Table) -> None:
    """It is called outside of the lock."""
    clean.table.add("sid", AckCallback(lambda: clean.add("sid"), is_inline=True))
    thread = threading.Thread(target=clean.table.resolve, args=(1, "sid", ()), daemon=True)
    thread.start()
    thread.join(5.0)
    assert not thread.is_alive(), "deadlock"
    assert len(clean.table) == 1


# The sweeper


@pytest.fixture
def swept(clean: Table) -> Iterator[Table]:
    """A table with its sweeper at work."""
    handle = start_sweeper(clean)
    clean.runtime.sleep(0.01)
    yield clean
    handle.stop()
    assert handle.join(2.0), "the sweeper does not stop"


def start_sweeper(table: Table) -> TaskHandle:
    supervisor = Supervisor(table.runtime, on_failure=lambda *_: None, on_change=lambda *_: None)
    return supervisor.watch(
        "sweeper",
        table.table.sweep,
        policy=RestartPolicy(Restart.NEVER),
        wake=table.table.wake,
    )


def test_the_sweeper_drops_what_expires_when_it_expires(swept: Table) -> None:
    began_at = clock()
    swept.add(timeout=0.1)
    wait_for(swept.runtime, lambda: swept.lost)
    assert 0.09 <= clock() - began_at < 1.0


def test_the_sweeper_wakes_for_a_nearer_deadline(swept: Table) -> None:
    """It sleeps for the first, long one when the second, short one is added."""
    swept.add("slow", timeout=30.0)
    swept.runtime.sleep(0.02)
    swept.add("soon", timeout=0.05)
    began_at = clock()
    wait_for(swept.runtime, lambda: swept.lost)
    assert clock() - began_at < 1.0
    assert swept.lost == [("expired", "soon")]


def test_the_sweeper_wakes_for_a_timeout_that_was_known_before(swept: Table) -> None:
    """Its queue was empty, and so forgotten, when the sweeper looked last."""
    for _ in range(3):
        swept.table.resolve(swept.add(timeout=0.05), "sid", ())
    swept.runtime.sleep(0.02)
    swept.add(timeout=0.05)
    began_at = clock()
    wait_for(swept.runtime, lambda: swept.lost)
    assert clock() - began_at < 1.0


# Random walks


class TableWalk(RuleBasedStateMachine):
    """Adds, answers, loses and lets time pass, and follows by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(callbacks_module, "clock", self.clock)
        self.subject = Table(GeventRuntime())
        self.waiting: dict[int, tuple[str, float]] = {}
        self.expected_lost: list[tuple[str, str]] = []
        self.answered = 0

    def teardown(self) -> None:
        self.patch.undo()

    @rule(recipient=st.sampled_from("abc"), timeout=st.sampled_from([1.0, 2.0, 3.5, 10.0]))
    def add(self, recipient: str, timeout: float) -> None:
        ack_id = self.subject.add(recipient, timeout=timeout)
        assert ack_id not in self.waiting
        self.waiting[ack_id] = (recipient, self.clock.now + timeout)

    @precondition(lambda self: self.waiting)
    @rule(choice=st.integers(min_value=0), recipient=st.sampled_from("abc"))
    def answer(self, choice: int, recipient: str) -> None:
        ack_id = list(self.waiting)[choice % len(self.waiting)]
        is_right = self.waiting[ack_id][0] == recipient
        assert self.subject.table.resolve(ack_id, recipient, (1,)) is is_right
        if is_right:
            del self.waiting[ack_id]
            self.answered += 1

    @rule(recipient=st.sampled_from("abcd"))
    def leave(self, recipient: str) -> None:
        self.subject.table.lose_recipient(recipient, "gone")
        self._expect([i for i, (who, _) in self.waiting.items() if who == recipient], "gone")

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 7.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        next_deadline = self.subject.table.expire()
        now = self.clock.now
        self._expect([i for i, (_, at) in self.waiting.items() if at <= now], "expired")
        deadlines = [at for _, at in self.waiting.values()]
        assert next_deadline == (min(deadlines) - now if deadlines else None)

    def _expect(self, ack_ids: list[int], reason: str) -> None:
        for ack_id in ack_ids:
            self.expected_lost.append((reason, self.waiting.pop(ack_id)[0]))

    @invariant()
    def all_are_accounted_for(self) -> None:
        assert len(self.subject.table) == len(self.waiting)
        assert len(self.subject.answers) == self.answered
        assert sorted(self.subject.lost, key=str) == sorted(self.expected_lost)
        recipients = {who for who, _ in self.waiting.values()}
        assert set(self.subject.table._by_recipient) == recipients


TestTableWalk = TableWalk.TestCase
TestTableWalk.settings = settings(
    max_examples=examples(40),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
