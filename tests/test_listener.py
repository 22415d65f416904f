"""The listener's own judgement, on a message queue that breaks as it is told to.

Real brokers and real clients are in ``tests/faults``.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.core.runtime import TIME_SLICE, GeventRuntime, Runtime, clock
from flask_socketio_guard.core.supervisor import Supervisor
from flask_socketio_guard.errors import BrokerError
from flask_socketio_guard.queue import listener as listener_module
from flask_socketio_guard.queue.listener import LISTENER_TASK, PROBE_TASK, Listener
from flask_socketio_guard.queue.reachability import Reachability
from flask_socketio_guard.queue.transport import Arrival, Probe
from flask_socketio_guard.states import ListenerState
from tests.support import unit_support
from tests.support.unit_support import longest_run_without, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime

PROBE_INTERVAL = 0.05
PROBE_TIMEOUT = 0.1


class WebSocketTransport:
    """One connection to the queue."""

    is_receiving = False

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.arrived: deque[Arrival | Exception] = deque()
        self.news = queue.runtime.flag()
        self.release = queue.runtime.flag()
        self.is_closed = False
        self.is_deaf = False
        self.is_hung = False

    def push(self, arrival: Arrival | Exception) -> None:
        self.arrived.append(arrival)
        self.news.set()

    def read(self, timeout: float) -> list[Arrival]:
        if self.is_closed:
            raise BrokerError("the connection is closed")
        if not self.arrived:
            self.news.clear()
            if not self.arrived:
                self.news.wait(timeout)
        if self.is_hung:
            self.release.wait(10.0)
        found: list[Arrival] = []
        while self.arrived and len(found) < 64:
            arrival = self.arrived.popleft()
            if isinstance(arrival, Exception):
                raise arrival
            found.append(arrival)
        return found

    def close(self) -> None:
        self.is_closed = True
        self.news.set()


class Queue:
    """A message queue with the faults that a broker can have.

    Attributes:
        is_up: Whether new connections, publishing and checks work.
        is_deaf: Whether what is published reaches nobody.
        can_publish: Whether probes get out while the queue is up.
        refusals: How many of the next subscriptions are refused while the queue is up.
        on_check: Called when the queue is asked whether it is there.
    """

    def __init__(self, runtime: Runtime, *, probe_interval: float = PROBE_INTERVAL) -> None:
        self.runtime = runtime
        self.is_up = True
        self.is_deaf = False
        self.can_publish = True
        self.refusals = 0
        self.probes = 0
        self.on_check: Callable[[], object] = lambda: None
        self.reasons: list[str] = []
        self.wires: list[WebSocketTransport] = []
        self.subscribed_at: list[float] = []
        self.handled: list[Any] = []
        self.failures: list[BaseException] = []
        self.changes: list[tuple[str, str]] = []
        self.crashes: list[BaseException] = []
        self.handle: Callable[[Any], object] = self.handled.append
        self.broker = Reachability(self._check, on_change=self._broker_changed)
        self.supervisor = Supervisor(
            runtime,
            on_failure=lambda _, exc: self.crashes.append(exc),
            on_change=self._task_changed,
        )
        self.listener = Listener(
            runtime,
            self.supervisor,
            self.broker,
            subscribe=self._subscribe,
            handle=lambda message: self.handle(message) and None,
            send_probe=self._publish_probe,
            probe_interval=probe_interval,
            probe_timeout=PROBE_TIMEOUT,
            reconnect_max_delay=0.02,
            on_change=self._changed,
            on_message_failure=self.failures.append,
        )

    def _changed(self, old: ListenerState, new: ListenerState, reason: str) -> None:
        self.changes.append((str(old), str(new)))
        self.reasons.append(reason)

    def _check(self) -> BrokerError | None:
        self.on_check()
        return None if self.is_up else BrokerError("connection refused")

    def _broker_changed(self, is_reachable: bool, reason: str, duration: float) -> None:
        del duration
        if is_reachable:
            self.listener.broker_answers()
        else:
            self.listener.broker_lost(reason)

    def _task_changed(self, task: Any, old: object, new: object, reason: str) -> None:
        del old
        if task.name == LISTENER_TASK and str(new) == "backing-off":
            self.listener.crashed(reason)

    def _subscribe(self) -> WebSocketTransport:
        self.subscribed_at.append(clock())
        if not self.is_up:
            raise BrokerError("connection refused")
        if self.refusals > 0:
            self.refusals -= 1
            raise BrokerError("NOPERM")
        self.wires.append(WebSocketTransport(self))
        return self.wires[-1]

    def _publish_probe(self, token: int) -> None:
        self.probes += 1
        if not self.is_up or not self.can_publish:
            return
        self.listener.probe_published(token)
        if not self.is_deaf:
            self.publish(Probe(token))

    def publish(self, arrival: Arrival) -> None:
        for wire in self.wires:
            if not wire.is_closed and not wire.is_deaf:
                wire.push(arrival)

    def break_connections(self) -> None:
        for wire in self.wires:
            if not wire.is_closed:
                wire.push(BrokerError("reset by peer"))

    @property
    def state(self) -> ListenerState:
        return self.listener.state

    def wait_for(self, condition: Callable[[], object], message: str = "") -> None:
        wait_for(self.runtime, condition, message=message or f"it is {self.state}")

    def wait_until(self, state: ListenerState) -> None:
        self.wait_for(lambda: self.state is state, f"it never became {state}")


@pytest.fixture
def queue(runtime: Runtime) -> Iterator[Queue]:
    """A queue and its listener, not yet started."""
    queue = Queue(runtime)
    yield queue
    queue.is_up = True
    assert queue.supervisor.stop(3.0, is_internal=True) == []


@pytest.fixture
def running(queue: Queue) -> Queue:
    """A queue whose listener runs."""
    queue.listener.start()
    queue.wait_until(ListenerState.RUNNING)
    return queue


def test_a_listener_runs_when_its_first_probe_has_come_back(queue: Queue) -> None:
    assert queue.state is ListenerState.IDLE
    assert queue.listener.heard_at is None
    queue.listener.start()
    queue.wait_until(ListenerState.RUNNING)
    assert queue.changes == [("idle", "starting"), ("starting", "running")]
    assert queue.listener.heard_at is not None
    assert queue.listener.restarts == 0
    assert [task.name for task in queue.supervisor.tasks] == [LISTENER_TASK, PROBE_TASK]
    assert all(task.is_internal for task in queue.supervisor.tasks)


def test_messages_are_handed_over_in_order_and_probes_are_not(running: Queue) -> None:
    for number in range(20):
        running.publish(b"%d" % number)
    running.publish({"method": "emit"})
    running.wait_for(lambda: len(running.handled) == 21)
    assert running.handled == [*(b"%d" % number for number in range(20)), {"method": "emit"}]


def test_a_message_that_fails_does_not_cost_the_next(running: Queue) -> None:
    def handle(message: object) -> None:
        if message == b"bad":
            raise ValueError("bad")
        running.handled.append(message)

    running.handle = handle
    for message in (b"good", b"bad", b"good"):
        running.publish(message)
    running.wait_for(lambda: len(running.handled) == 2)
    assert [str(failure) for failure in running.failures] == ["bad"]
    assert len(running.wires) == 1
    assert running.state is ListenerState.RUNNING


def test_a_broken_connection_is_replaced_at_once(
    running: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt comes without delay: most often the broker is there."""
    delays: list[float] = []
    monkeypatch.setattr(listener_module, "sleep", lambda _, seconds: delays.append(seconds))
    running.break_connections()
    running.wait_for(lambda: len(running.wires) == 2)
    running.wait_until(ListenerState.RUNNING)
    running.publish(b"after")
    running.wait_for(lambda: running.handled)
    assert running.broker.is_reachable
    assert running.crashes == []
    assert running.wires[0].is_closed
    assert delays == []


def test_a_broker_that_is_away_is_tried_again_until_it_is_back(running: Queue) -> None:
    running.is_up = False
    running.break_connections()
    running.wait_until(ListenerState.RECONNECTING)
    attempts = len(running.subscribed_at)
    running.wait_for(lambda: len(running.subscribed_at) >= attempts + 5)
    assert not running.broker.is_reachable
    assert running.state is ListenerState.RECONNECTING
    running.is_up = True
    running.wait_until(ListenerState.RUNNING)
    assert running.broker.is_reachable
    assert ("running", "reconnecting") in running.changes
    assert ListenerState.STALLED not in [new for _, new in running.changes]


def test_attempts_to_reconnect_are_no_busy_loop(running: Queue) -> None:
    running.is_up = False
    running.break_connections()
    running.wait_until(ListenerState.RECONNECTING)
    before = len(running.subscribed_at)
    running.runtime.sleep(0.3)
    assert len(running.subscribed_at) - before < 60


def test_a_deaf_listener_is_found_out_and_replaced(running: Queue) -> None:
    """Nothing breaks; the connection just brings nothing any more."""
    deaf_at = clock()
    (wire,) = running.wires
    wire.is_deaf = True
    running.wait_for(lambda: running.listener.restarts == 1)
    assert clock() - deaf_at < 10 * (PROBE_INTERVAL + PROBE_TIMEOUT)
    running.wait_until(ListenerState.RUNNING)
    assert ("running", "stalled") in running.changes
    running.wait_for(lambda: wire.is_closed, "the deaf connection stays open")
    assert running.crashes == []
    running.publish(b"heard again")
    running.wait_for(lambda: running.handled)
    assert running.handled == [b"heard again"]
    running.runtime.sleep(2 * PROBE_TIMEOUT)
    assert running.listener.restarts == 1


def test_a_listener_in_the_middle_of_a_large_message_is_not_deaf(running: Queue) -> None:
    """Its probes are behind the message, on a slow link."""
    (wire,) = running.wires
    wire.is_receiving = True
    wire.is_deaf = True
    asked = running.probes
    running.wait_for(lambda: running.probes >= asked + 8)
    assert running.listener.restarts == 0
    assert not wire.is_closed
    wire.is_receiving = False
    running.wait_for(lambda: running.listener.restarts == 1)


def test_a_reader_that_hangs_is_replaced_and_never_heard_again(running: Queue) -> None:
    """Not even closing its connection wakes it; a thread cannot be killed either."""
    (wire,) = running.wires
    wire.is_hung = True
    running.wait_for(lambda: len(running.wires) == 2, "it was not replaced")
    running.wait_until(ListenerState.RUNNING)
    wire.push(b"late")
    wire.release.set()
    running.publish(b"on time")
    running.wait_for(lambda: running.handled)
    running.runtime.sleep(0.05)
    assert running.handled == [b"on time"]
    assert len(running.wires) == 2


def test_a_probe_that_comes_back_while_the_broker_is_asked_counts(running: Queue) -> None:
    """It was late, but the listener is not deaf."""
    asked: list[bool] = []

    def answer_late() -> None:
        if not asked:
            asked.append(True)
            running.is_deaf = False
            running.publish(Probe(running.listener._token))
            heard_at = running.listener.heard_at
            running.wait_for(lambda: running.listener.heard_at != heard_at)

    running.on_check = answer_late
    running.is_deaf = True
    running.wait_for(lambda: asked)
    running.runtime.sleep(PROBE_TIMEOUT)
    assert running.listener.restarts == 0
    assert running.state is ListenerState.RUNNING


def test_a_probe_that_waits_in_the_outbox_is_no_fault_of_the_listener(running: Queue) -> None:
    """The broker answers, but the publisher is stuck on a connection of its own."""
    running.can_publish = False
    running.runtime.sleep(5 * PROBE_TIMEOUT)
    assert running.listener.restarts == 0
    assert running.state is ListenerState.RUNNING


def test_probes_from_before_an_outage_prove_nothing(running: Queue) -> None:
    """A broker that hung has swallowed them; it is back, and the listener is fine."""
    (wire,) = running.wires
    token = running.listener._token
    running.is_deaf = True
    running.wait_for(lambda: running.listener._published > token)
    running.is_up = False
    running.wait_until(ListenerState.RECONNECTING)
    running.is_up, running.is_deaf = True, False
    running.broker.report_answer()
    running.wait_until(ListenerState.RUNNING)
    assert running.listener.restarts == 0
    assert running.wires == [wire]


def test_a_listener_that_stays_deaf_is_replaced_again_and_again(running: Queue) -> None:
    running.is_deaf = True
    running.wait_for(lambda: running.listener.restarts >= 3)
    assert running.state is ListenerState.STALLED


def test_a_probe_that_never_got_out_is_no_fault_of_the_listener(running: Queue) -> None:
    """The publisher cannot reach the broker; the listener's connection is fine."""
    running.is_up = False
    running.runtime.sleep(4 * PROBE_TIMEOUT)
    assert running.listener.restarts == 0
    assert len(running.wires) == 1
    assert running.state is ListenerState.RECONNECTING
    running.is_up = True
    running.broker.report_answer()
    running.wait_until(ListenerState.RUNNING)
    assert running.listener.restarts == 0


def test_a_hung_broker_is_lost_and_not_a_stall(running: Queue) -> None:
    """Nothing comes back, but a fresh connection brings nothing either."""
    running.is_up = False
    running.is_deaf = True
    running.wait_until(ListenerState.RECONNECTING)
    assert "stalled" not in [new for _, new in running.changes]


def test_a_listener_that_may_not_subscribe_is_a_local_fault(queue: Queue) -> None:
    """The broker is well and says no: a load balancer should prefer another process."""
    queue.refusals = 10**6
    queue.listener.start()
    queue.wait_until(ListenerState.STALLED)
    assert "cannot subscribe: NOPERM" in queue.reasons
    assert queue.broker.is_reachable
    queue.refusals = 0
    queue.wait_until(ListenerState.RUNNING)


def test_one_refusal_means_nothing(queue: Queue) -> None:
    """The broker may have come back between the two questions."""
    queue.refusals = 1
    queue.listener.start()
    queue.wait_until(ListenerState.RUNNING)
    assert queue.changes == [("idle", "starting"), ("starting", "running")]


def test_a_connection_that_breaks_while_the_broker_is_known_to_be_away(running: Queue) -> None:
    """The publisher had lost it; the listener heard on for a while."""
    running.broker.report_lost("the publisher cannot reach it")
    running.wait_for(lambda: running.changes[-1] == ("reconnecting", "running"))
    running.is_up = False
    running.break_connections()
    running.wait_until(ListenerState.RECONNECTING)


def test_a_flood_of_messages_lets_others_run(nothing_left_behind: None) -> None:
    """Under gevent, reading never waits while there is something to read."""
    queue = Queue(GeventRuntime())
    queue.listener.start()
    queue.wait_until(ListenerState.RUNNING)
    seen: list[int] = []

    def handle(message: object) -> None:
        queue.handled.append(message)
        if len(queue.handled) == 1:
            queue.runtime.spawn(lambda: seen.append(len(queue.handled)), name="other")

    queue.handle = handle
    queue.wires[0].arrived.extend([b"x"] * 5000)
    queue.wires[0].news.set()
    queue.wait_for(lambda: len(queue.handled) == 5000)
    assert seen[0] < 1000
    assert queue.supervisor.stop(3.0, is_internal=True) == []


def test_messages_that_take_long_do_not_add_up_for_others(
    nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may be a broadcast to thousands; many of them come in one piece."""
    spent = 0.0
    monkeypatch.setattr(listener_module, "clock", lambda: clock() + spent)
    queue = Queue(GeventRuntime())
    queue.listener.start()
    queue.wait_until(ListenerState.RUNNING)
    log: list[object] = []

    def handle(message: object) -> None:
        nonlocal spent
        spent += 2 * TIME_SLICE / 3
        log.append(message)

    queue.handle = handle
    with unit_support.busy_socket(lambda: log.append("other")):
        queue.wires[0].arrived.extend([b"x"] * 40)
        queue.wires[0].news.set()
        queue.wait_for(lambda: log.count(b"x") == 40)
    assert longest_run_without(log, "other") <= 8
    assert queue.supervisor.stop(3.0, is_internal=True) == []


def test_a_crash_of_the_reader_is_restarted_at_once(running: Queue) -> None:
    for wire in running.wires:
        wire.push(RuntimeError("the queue's listen() returned"))
    running.wait_for(lambda: len(running.wires) == 2, "it was not started again")
    running.wait_until(ListenerState.RUNNING)
    assert [str(crash) for crash in running.crashes] == ["the queue's listen() returned"]
    assert ("running", "stalled") in running.changes
    running.publish(b"after")
    running.wait_for(lambda: running.handled)


def test_a_base_exception_out_of_a_message_restarts_the_reader(running: Queue) -> None:
    """Nothing of the application runs here; if something leaks all the same, it is survived."""

    def handle(message: object) -> None:
        running.handled.append(message)
        if len(running.handled) == 1:
            raise SystemExit(3)

    running.handle = handle
    running.publish(b"first")
    running.wait_for(lambda: len(running.wires) == 2)
    running.wait_until(ListenerState.RUNNING)
    running.publish(b"second")
    running.wait_for(lambda: len(running.handled) == 2)


def test_a_probe_that_somebody_made_up_proves_nothing(running: Queue) -> None:
    """Whoever can write to the channel can send tokens of the future."""
    running.is_deaf = True
    deadline = clock() + 40 * PROBE_TIMEOUT
    while running.state is ListenerState.RUNNING and clock() < deadline:
        running.publish(Probe(10**9))
        running.runtime.sleep(0.005)
    assert running.state is ListenerState.STALLED


def test_a_listener_that_stops_says_so_and_is_silent_afterwards(running: Queue) -> None:
    assert running.supervisor.stop(3.0, is_internal=True) == []
    running.listener.stopped()
    assert running.state is ListenerState.STOPPED
    assert all(wire.is_closed for wire in running.wires)
    changes = list(running.changes)
    running.listener.broker_lost("late news")
    running.listener.crashed("late news")
    running.listener.broker_answers()
    running.listener.stopped()
    assert running.changes == changes
    assert running.crashes == []


def test_a_listener_that_waits_stops_at_once(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its reading nor its next probe is waited for."""
    monkeypatch.setattr(listener_module, "_READ_TIMEOUT", 60.0)
    queue = Queue(runtime, probe_interval=60.0)
    queue.listener.start()
    queue.wait_until(ListenerState.RUNNING)
    runtime.sleep(0.05)
    began_at = clock()
    assert queue.supervisor.stop(10.0, is_internal=True) == []
    assert clock() - began_at < 2.0


def test_a_listener_stops_while_its_broker_is_away(queue: Queue) -> None:
    queue.is_up = False
    queue.listener.start()
    queue.wait_until(ListenerState.RECONNECTING)
    began_at = clock()
    assert queue.supervisor.stop(3.0, is_internal=True) == []
    assert clock() - began_at < 1.0


def test_probes_keep_to_their_interval(running: Queue) -> None:
    """A return hastens none of the next ones."""
    tokens = running.listener._token
    running.runtime.sleep(10 * PROBE_INTERVAL)
    assert 3 <= running.listener._token - tokens <= 12


def test_a_forked_child_lets_go_of_the_connection_and_says_nothing(running: Queue) -> None:
    """What comes over it is for the parent; the child's loop, where it is due, must not read it."""
    running.listener.abandon()
    assert running.wires[0].is_closed
    assert running.changes == [("idle", "starting"), ("starting", "running")]
    assert running.broker.is_reachable
