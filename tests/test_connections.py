"""One connection's life, however its ends meet; and the books of them all."""

from __future__ import annotations

import gc
import json
import random
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import flask
import gevent
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flask_socketio_guard.clients.connections import Connection, Connections
from flask_socketio_guard.core.runtime import clock
from flask_socketio_guard.errors import InvalidTransition
from flask_socketio_guard.states import ConnectionState
from flask_socketio_guard.telemetry import records as signals
from tests.support import unit_support, wait_until
from tests.support.scale import examples

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_support import Guarded, PollingClient

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
guarded = unit_support.guarded

CLIENT = "client disconnect"
SERVER = "server disconnect"
STATES = ("connecting", "open", "ready", "closing")


class Timer:
    """A timer that counts how often it was cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


@dataclass
class Registry:
    """A registry, and what it told."""

    told: list[tuple[str, str | None, str, str]] = field(default_factory=list)
    failures: list[tuple[str, BaseException]] = field(default_factory=list)
    on_change: Callable[[Connection], object] = lambda connection: None

    def __post_init__(self) -> None:
        self.connections = Connections(
            on_change=self._changed,
            on_failure=lambda connection, exc: self.failures.append((connection.sid, exc)),
            call_apart=lambda target: target(),
        )

    def _changed(
        self, connection: Connection, old: ConnectionState | None, new: ConnectionState
    ) -> None:
        name = None if old is None else str(old)
        self.told.append((connection.sid, name, str(new), connection.reason))
        self.on_change(connection)

    def add(self, sid: str = "sid", namespace: str = "/", eio_sid: str = "eio") -> Connection:
        return self.connections.add(sid, namespace, eio_sid)

    def open(self, sid: str = "sid", namespace: str = "/", eio_sid: str = "eio") -> Connection:
        connection = self.add(sid, namespace, eio_sid)
        assert connection.accept()
        return connection

    def close(self, sid: str, reason: str = CLIENT) -> None:
        connection = self.connections[sid]
        assert connection.begin_close(reason)
        connection.finish()

    def changes(self) -> list[tuple[str | None, str]]:
        """Return the changes that were told, of all connections."""
        return [(old, new) for _, old, new, _ in self.told]


@pytest.fixture
def registry() -> Registry:
    return Registry()


def in_thread(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, name="other", daemon=True)
    thread.start()
    return thread


# A life


def test_a_connection_that_is_let_in_lives_and_ends(registry: Registry) -> None:
    began_at = clock()
    connection = registry.add("sid", "/chat", "eio")
    assert (connection.sid, connection.namespace, connection.eio_sid) == ("sid", "/chat", "eio")
    assert began_at <= connection.opened_at <= clock()
    assert connection.state is ConnectionState.CONNECTING
    assert (connection.is_accepted, connection.is_open, connection.is_ready) == (False,) * 3
    assert connection.accept()
    assert connection.state is ConnectionState.OPEN
    assert (connection.is_accepted, connection.is_open, connection.is_ready) == (True, True, False)
    assert connection.shake_hands()
    assert connection.state is ConnectionState.READY
    assert (connection.is_open, connection.is_ready) == (True, True)
    assert connection.reason == ""
    assert connection.begin_close(CLIENT)
    assert connection.state is ConnectionState.CLOSING
    assert (connection.is_open, connection.is_ready) == (False, False)
    assert connection.reason == CLIENT
    connection.finish()
    assert connection.state is ConnectionState.CLOSED
    assert (connection.is_open, connection.is_ready) == (False, False)
    assert registry.told == [
        ("sid", None, "connecting", ""),
        ("sid", "connecting", "open", ""),
        ("sid", "open", "ready", ""),
        ("sid", "ready", "closing", CLIENT),
        ("sid", "closing", "closed", CLIENT),
    ]
    assert len(registry.connections) == 0


def test_a_connection_is_no_garbage(registry: Registry) -> None:
    """Nothing of it is left to the garbage collector, which would have much to do.

    Of many connections, for threads that other tests have left may leave some garbage of theirs.
    """
    count = 1000
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            registry.open()
            registry.close("sid")
        assert gc.collect() < count
    finally:
        gc.enable()


def test_a_connection_that_is_refused_was_never_open(registry: Registry) -> None:
    connection = registry.add()
    connection.refuse()
    assert connection.state is ConnectionState.CLOSED
    assert not connection.is_accepted
    assert registry.changes() == [(None, "connecting"), ("connecting", "closed")]
    assert "sid" not in registry.connections


def test_a_connection_says_what_it_is_and_not_whose(registry: Registry) -> None:
    """It may end in a log; the session id is as good as a password."""
    text = repr(registry.open("secret", "/chat", "secret too"))
    assert text == "<Connection open in '/chat'>"


# Races


def test_a_client_that_leaves_during_its_connect_handler_is_not_open_afterwards(
    registry: Registry,
) -> None:
    connection = registry.add()
    assert connection.begin_close(CLIENT)
    assert not connection.is_accepted
    assert not connection.accept()
    assert connection.is_accepted
    assert not connection.is_open
    assert connection.state is ConnectionState.CLOSING
    connection.finish()
    assert registry.told == [
        ("sid", None, "connecting", ""),
        ("sid", "connecting", "closing", CLIENT),
        ("sid", "closing", "closed", CLIENT),
    ]


def test_a_client_that_leaves_during_its_connect_handler_may_be_refused(
    registry: Registry,
) -> None:
    connection = registry.add()
    connection.begin_close(CLIENT)
    connection.refuse()
    assert connection.state is ConnectionState.CLOSED
    assert connection.reason == CLIENT
    assert not connection.is_accepted
    assert registry.told[1:] == [
        ("sid", "connecting", "closing", CLIENT),
        ("sid", "closing", "closed", CLIENT),
    ]
    assert len(registry.connections) == 0


def test_who_closes_first_is_told_so_and_has_the_reason(registry: Registry) -> None:
    connection = registry.open()
    assert connection.begin_close(SERVER)
    assert not connection.begin_close(CLIENT)
    connection.finish()
    assert not connection.begin_close("ping timeout")
    assert connection.reason == SERVER
    assert connection.state is ConnectionState.CLOSED
    assert registry.changes()[2:] == [("open", "closing"), ("closing", "closed")]


def test_a_connection_ends_once(registry: Registry) -> None:
    connection = registry.open()
    calls: list[str] = []
    connection.defer(lambda: calls.append("released"))
    connection.begin_close(CLIENT)
    connection.finish()
    told = list(registry.told)
    with pytest.raises(InvalidTransition):
        connection.finish()
    with pytest.raises(InvalidTransition):
        connection.refuse()
    assert calls == ["released"]
    assert registry.told == told


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_connection_that_is_open_does_not_end_without_a_close(
    registry: Registry, is_ready: bool
) -> None:
    connection = registry.open()
    connection.defer(pytest.fail)
    if is_ready:
        connection.shake_hands()
    state = connection.state
    for move in (connection.finish, connection.refuse, connection.accept):
        with pytest.raises(InvalidTransition):
            move()
    assert connection.state is state
    assert registry.connections["sid"] is connection


def test_a_handshake_counts_only_while_it_is_open(registry: Registry) -> None:
    connection = registry.add()
    assert not connection.shake_hands()
    assert connection.state is ConnectionState.CONNECTING
    connection.accept()
    assert connection.shake_hands()
    assert connection.shake_hands()
    connection.begin_close(CLIENT)
    assert not connection.shake_hands()
    assert connection.state is ConnectionState.CLOSING
    connection.finish()
    assert not connection.shake_hands()
    assert [new for _, new in registry.changes()] == [*STATES, "closed"]


def test_many_who_close_at_once_are_one_who_does(registry: Registry) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    connections = [registry.open(str(number)) for number in range(200)]
    firsts: list[str] = []
    barrier = threading.Barrier(4)

    def close(reason: str) -> None:
        barrier.wait()
        for connection in connections:
            if connection.begin_close(reason):
                firsts.append(connection.sid)
                assert connection.reason == reason
                connection.finish()

    threads = [in_thread(lambda name=name: close(name)) for name in "abcd"]
    try:
        for thread in threads:
            thread.join(10.0)
    finally:
        sys.setswitchinterval(interval)
    assert sorted(firsts) == sorted(connection.sid for connection in connections)
    assert len(registry.connections) == registry.connections.count() == 0
    assert len(registry.told) == 4 * 200


# What was deferred


def test_what_was_deferred_is_released_in_reverse_order(registry: Registry) -> None:
    connection = registry.open()
    released: list[int] = []
    for number in range(5):
        connection.defer(lambda number=number: released.append(number))
    connection.begin_close(CLIENT)
    assert released == []
    connection.finish()
    assert released == [4, 3, 2, 1, 0]


def test_what_was_deferred_is_released_after_the_connection_has_closed(registry: Registry) -> None:
    """Its cleanup must not find itself open, nor in the registry."""
    connection = registry.open()
    seen: list[object] = []

    def cleanup() -> None:
        seen.extend([connection.state, len(registry.connections), registry.changes()[-1]])

    connection.defer(cleanup)
    connection.begin_close(CLIENT)
    connection.finish()
    assert seen == [ConnectionState.CLOSED, 0, ("closing", "closed")]


@pytest.mark.parametrize("is_left", [False, True], ids=["stays", "leaves"])
def test_what_a_connect_handler_deferred_is_released_when_it_refuses(
    registry: Registry, is_left: bool
) -> None:
    connection = registry.add()
    released: list[str] = []
    connection.defer(lambda: released.append("a"))
    if is_left:
        connection.begin_close(CLIENT)
        assert released == []
    connection.refuse()
    assert released == ["a"]


def test_what_is_deferred_during_the_close_waits_for_its_end(registry: Registry) -> None:
    connection = registry.open()
    connection.begin_close(CLIENT)
    released: list[str] = []
    connection.defer(lambda: released.append("late"))
    assert released == []
    connection.finish()
    assert released == ["late"]


def test_what_is_deferred_too_late_is_released_at_once(registry: Registry) -> None:
    connection = registry.open()
    connection.begin_close(CLIENT)
    connection.finish()
    released: list[str] = []
    for number in range(2):
        connection.defer(lambda number=number: released.append(f"late {number}"))
        assert released[-1] == f"late {number}"
    assert len(released) == 2


def test_a_cleanup_may_defer_another(registry: Registry) -> None:
    connection = registry.open()
    released: list[str] = []

    def outer() -> None:
        connection.defer(lambda: released.append("inner"))
        released.append("outer")

    connection.defer(outer)
    connection.begin_close(CLIENT)
    connection.finish()
    assert released == ["inner", "outer"]


def test_what_is_deferred_twice_is_released_twice(registry: Registry) -> None:
    connection = registry.open()
    released: list[str] = []

    def cleanup() -> None:
        released.append("a")

    connection.defer(cleanup)
    connection.defer(cleanup)
    connection.begin_close(CLIENT)
    connection.finish()
    assert released == ["a", "a"]


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(1), gevent.GreenletExit()])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_cleanup_that_raises_is_recorded_and_keeps_no_other_waiting(
    registry: Registry, error: BaseException, is_late: bool
) -> None:
    connection = registry.open()
    released: list[str] = []

    def fail() -> None:
        raise error

    connection.defer(lambda: released.append("first"))
    connection.defer(fail)
    connection.defer(lambda: released.append("last"))
    connection.begin_close(CLIENT)
    connection.finish()
    assert released == ["last", "first"]
    assert registry.failures == [("sid", error)]
    if is_late:
        connection.defer(fail)
        assert registry.failures == [("sid", error)] * 2


def test_a_cleanup_that_takes_its_time_holds_nobody_up(registry: Registry) -> None:
    """Others come, go and are counted meanwhile."""
    connection = registry.open()
    done: list[int] = []

    def meanwhile() -> None:
        registry.open("other")
        registry.close("other")
        done.append(registry.connections.count())

    def cleanup() -> None:
        other = in_thread(meanwhile)
        other.join(5.0)
        assert not other.is_alive(), "it is held up"

    connection.defer(cleanup)
    connection.begin_close(CLIENT)
    connection.finish()
    connection.defer(cleanup)
    assert done == [0, 0]
    assert registry.failures == []


def test_what_threads_defer_while_it_closes_is_released_once(registry: Registry) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    released: list[object] = []
    try:
        for round_number in range(100):
            connection = registry.open(str(round_number))
            barrier = threading.Barrier(3)

            def defer(
                name: str, connection: Connection = connection, barrier: threading.Barrier = barrier
            ) -> None:
                barrier.wait()
                for number in range(20):
                    mark = (connection.sid, name, number)
                    connection.defer(lambda mark=mark: released.append(mark))

            threads = [in_thread(lambda name=name: defer(name)) for name in "ab"]
            barrier.wait()
            connection.begin_close(CLIENT)
            connection.finish()
            for thread in threads:
                thread.join(5.0)
    finally:
        sys.setswitchinterval(interval)
    assert len(released) == len(set(released)) == 100 * 2 * 20


# The application's own handshake


def test_a_handshake_cancels_the_timer(registry: Registry) -> None:
    connection = registry.open()
    timer = Timer()
    connection.expect_handshake(timer)
    assert timer.cancelled == 0
    connection.shake_hands()
    assert timer.cancelled == 1
    connection.shake_hands()
    connection.begin_close(CLIENT)
    connection.finish()
    assert timer.cancelled == 1


def test_a_close_cancels_the_timer(registry: Registry) -> None:
    connection = registry.open()
    timer = Timer()
    connection.expect_handshake(timer)
    connection.begin_close(CLIENT)
    assert timer.cancelled == 1
    connection.begin_close(CLIENT)
    connection.finish()
    assert timer.cancelled == 1


def test_a_handshake_that_does_not_count_leaves_the_timer(registry: Registry) -> None:
    connection = registry.add()
    timer = Timer()
    connection.expect_handshake(timer)
    assert not connection.shake_hands()
    assert timer.cancelled == 0


@pytest.mark.parametrize("end", ["ready", "closing", "closed"])
def test_a_timer_that_comes_too_late_is_cancelled_at_once(registry: Registry, end: str) -> None:
    """Else it would close a client that has shaken hands, or hold on to one that is gone."""
    connection = registry.open()
    if end == "ready":
        connection.shake_hands()
    else:
        connection.begin_close(CLIENT)
    if end == "closed":
        connection.finish()
    timer = Timer()
    connection.expect_handshake(timer)
    assert timer.cancelled == 1


# The registry


def test_the_registry_is_a_mapping_of_those_that_are_not_closed(registry: Registry) -> None:
    connections = registry.connections
    assert (len(connections), list(connections), bool(connections)) == (0, [], False)
    first, second = registry.add("a"), registry.open("b")
    assert (connections["a"], connections["b"]) == (first, second)
    assert list(connections) == ["a", "b"]
    assert dict(connections) == {"a": first, "b": second}
    assert "a" in connections
    assert "c" not in connections
    assert connections.get("c") is None
    with pytest.raises(KeyError):
        connections["c"]
    second.begin_close(CLIENT)
    assert connections["b"] is second
    second.finish()
    assert list(connections.values()) == [first]


@pytest.mark.parametrize("sid", [None, 5, ["a"], {"a": 1}, b"a", ("a",), "b", ""])
def test_whatever_is_asked_for_is_found_or_not(registry: Registry, sid: object) -> None:
    connection = registry.open("a")
    assert registry.connections.find(sid) is None
    assert registry.connections.find("a") is connection


def test_connections_are_counted_by_state_and_namespace(registry: Registry) -> None:
    registry.add("a", "/")
    registry.open("b", "/")
    registry.open("c", "/chat")
    registry.open("d", "/chat").shake_hands()
    registry.open("e", "/chat").begin_close(CLIENT)
    count = registry.connections.count
    assert count() == len(registry.connections) == 5
    assert [count(state) for state in STATES] == [1, 2, 1, 1]
    assert [count(ConnectionState(state)) for state in STATES] == [1, 2, 1, 1]
    assert count("closed") == 0
    assert (count(namespace="/"), count(namespace="/chat"), count(namespace="/no")) == (2, 3, 0)
    assert [count(state, "/chat") for state in STATES] == [0, 1, 1, 1]
    assert count(namespace="/", state="open") == 1


@pytest.mark.parametrize("state", ["opened", "", "OPEN", 5])
def test_a_state_that_there_is_not_cannot_be_counted(registry: Registry, state: Any) -> None:
    with pytest.raises(ValueError, match="is not a valid ConnectionState"):
        registry.connections.count(state)


def test_nothing_is_kept_of_those_that_are_gone(registry: Registry) -> None:
    for number in range(100):
        registry.open(str(number), f"/{number % 7}", f"eio-{number % 10}")
    for number in range(100):
        registry.close(str(number))
    connections = registry.connections
    assert (connections._by_sid, connections._by_eio_sid) == ({}, {})
    assert connections._counts == {}


def test_the_connections_of_one_client_are_known(registry: Registry) -> None:
    connections = registry.connections
    assert connections.of("eio") == ()
    first, second = registry.add("a", "/"), registry.open("b", "/chat")
    other = registry.open("c", "/", "eio-2")
    assert connections.of("eio") == (first, second)
    assert connections.of("eio-2") == (other,)
    first.refuse()
    assert connections.of("eio") == (second,)
    registry.close("b")
    assert connections.of("eio") == ()
    again = registry.add("d", "/")
    assert connections.of("eio") == (again,)


def test_who_is_found_by_the_client_stays_while_it_is_gone_through(registry: Registry) -> None:
    """All namespaces of a client end with its transport."""
    for number in range(5):
        registry.open(str(number), f"/{number}")
    for connection in registry.connections.of("eio"):
        registry.close(connection.sid)
    assert len(registry.connections) == 0


@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_clients_may_come_and_go_while_the_registry_is_gone_through(
    registry: Registry, view: str
) -> None:
    connections = registry.connections
    for number in range(10):
        registry.open(str(number))
    seen = []
    for number, entry in enumerate(getattr(connections, view)()):
        if number == 0:
            for each in range(5, 10):
                registry.close(str(each))
            registry.open("new")
        seen.append(entry)
    assert len(seen) >= 5
    assert len(connections) == 6


def test_threads_may_come_and_go_while_the_registry_is_gone_through(registry: Registry) -> None:
    connections = registry.connections
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    is_over = threading.Event()

    def come_and_go() -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            registry.open(str(number))
            registry.close(str(number))

    registry.open("steady")
    coming = in_thread(come_and_go)
    try:
        for _ in range(500):
            assert "steady" in list(connections)
            assert connections["steady"] in list(connections.values())
            assert ("steady", connections["steady"]) in list(connections.items())
            assert connections.count("open") >= 1
    finally:
        is_over.set()
        coming.join(5.0)
        sys.setswitchinterval(interval)


# What is told


def test_who_is_told_finds_the_books_as_they_are_then(registry: Registry) -> None:
    seen: list[tuple[str, int, list[int]]] = []

    def look(connection: Connection) -> None:
        counts = [registry.connections.count(state) for state in STATES]
        seen.append((str(connection.state), len(registry.connections), counts))

    registry.on_change = look
    registry.open().shake_hands()
    registry.close("sid")
    assert seen == [
        ("connecting", 1, [1, 0, 0, 0]),
        ("open", 1, [0, 1, 0, 0]),
        ("ready", 1, [0, 0, 1, 0]),
        ("closing", 1, [0, 0, 0, 1]),
        ("closed", 0, [0, 0, 0, 0]),
    ]


@pytest.mark.parametrize("new", ["connecting", "open", "ready", "closing", "closed", "refused"])
def test_a_change_is_told_before_anything_else_changes(registry: Registry, new: str) -> None:
    """So what is told is in order, whichever thread it was."""
    held_up: list[bool] = []

    def meanwhile(connection: Connection) -> None:
        if str(connection.state) == ("closed" if new == "refused" else new):
            other = in_thread(lambda: registry.add("other"))
            other.join(0.05)
            held_up.append(other.is_alive())
            registry.on_change = lambda connection: None

    registry.on_change = meanwhile
    connection = registry.add()
    if new == "refused":
        connection.refuse()
    else:
        connection.accept()
        connection.shake_hands()
        connection.begin_close(CLIENT)
        connection.finish()
    assert held_up == [True]
    wait_until(lambda: "other" in registry.connections)


def test_who_is_told_may_close_it(registry: Registry) -> None:
    def close(connection: Connection) -> None:
        if connection.is_open:
            connection.begin_close(SERVER)

    registry.on_change = close
    connection = registry.add()
    connection.accept()
    assert connection.state is ConnectionState.CLOSING
    connection.finish()
    assert registry.connections.count() == 0
    assert [new for _, new in registry.changes()] == ["connecting", "open", "closing", "closed"]


class HookedLock:
    """A lock after whose release something happens, once."""

    def __init__(self, inner: Any, hook: Callable[[], object]) -> None:
        self._inner = inner
        self._hook = hook
        self._is_done = False
        self._depth = 0

    def __enter__(self) -> None:
        self._inner.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        is_free = self._depth == 0
        self._inner.release()
        if is_free and not self._is_done:
            self._is_done = True
            self._hook()


def test_a_new_connection_is_told_before_anything_else_of_it(registry: Registry) -> None:
    """Also when its client leaves, in another thread, as soon as it can be found."""

    def leave() -> None:
        for connection in registry.connections.of("eio"):
            connection.begin_close(CLIENT)

    connections: Any = registry.connections
    lock = connections._lock
    connections._lock = HookedLock(lock, lambda: in_thread(leave).join(5.0))
    registry.add()
    assert registry.changes() == [(None, "connecting"), ("connecting", "closing")]


def test_the_books_are_right_when_threads_meet(registry: Registry) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def live(name: str) -> None:
        rng = random.Random(name)
        for number in range(200):
            connection = registry.add(f"{name}{number}", rng.choice(["/", "/chat"]), f"eio{number}")
            if rng.random() < 0.3:
                connection.refuse()
                continue
            connection.accept()
            if rng.random() < 0.5:
                connection.shake_hands()
            connection.begin_close(CLIENT)
            connection.finish()

    threads = [in_thread(lambda name=name: live(name)) for name in "abcd"]
    try:
        for thread in threads:
            thread.join(20.0)
    finally:
        sys.setswitchinterval(interval)
    connections = registry.connections
    assert (connections._by_sid, connections._by_eio_sid, connections._counts) == ({}, {}, {})
    changes: dict[str, list[str]] = {}
    for sid, old, new, _ in registry.told:
        changes.setdefault(sid, []).append(new)
        assert old == (changes[sid][-2] if len(changes[sid]) > 1 else None)
    assert len(changes) == 800
    assert {states[-1] for states in changes.values()} == {"closed"}


# Random walks

MOVES = {
    "connecting": {"accept": "open", "refuse": "closed", "close": "closing"},
    "open": {"shake": "ready", "close": "closing"},
    "ready": {"shake": "ready", "close": "closing"},
    "closing": {"accept": "closing", "refuse": "closed", "close": "closing", "finish": "closed"},
    "closed": {"close": "closed"},
}
"""What each state allows, written down once more."""


@dataclass
class Expected:
    """A connection as the model sees it."""

    connection: Connection
    namespace: str
    eio_sid: str
    state: str = "connecting"
    reason: str = ""
    deferred: list[int] = field(default_factory=list)


class ConnectionsWalk(RuleBasedStateMachine):
    """Moves any connection in any way at any time, and follows by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry()
        self.all: dict[str, Expected] = {}
        self.told: list[tuple[str, str | None, str, str]] = []
        self.released: list[int] = []
        self.expected_releases: list[int] = []
        self.number = 0

    @rule(namespace=st.sampled_from(["/", "/chat"]), eio_sid=st.sampled_from(["x", "y"]))
    def come(self, namespace: str, eio_sid: str) -> None:
        sid = f"sid-{len(self.all)}"
        connection = self.registry.add(sid, namespace, eio_sid)
        self.all[sid] = Expected(connection, namespace, eio_sid)
        self.told.append((sid, None, "connecting", ""))

    def _choose(self, choice: int) -> Expected:
        # The newest: the older ones are closed and allow little.
        newest = list(self.all.values())[-4:]
        return newest[choice % len(newest)]

    def _move(self, expected: Expected, move: str) -> bool:
        """Say whether *move* is allowed, and follow it."""
        new = MOVES[expected.state].get(move)
        if new is None:
            return False
        if new != expected.state:
            self.told.append((expected.connection.sid, expected.state, new, expected.reason))
        expected.state = new
        if new == "closed":
            self.expected_releases += reversed(expected.deferred)
            expected.deferred = []
        return True

    @precondition(lambda self: self.all)
    @rule(choice=st.integers(min_value=0, max_value=3))
    def accept(self, choice: int) -> None:
        expected = self._choose(choice)
        if self._move(expected, "accept"):
            assert expected.connection.accept() == (expected.state == "open")
        else:
            with pytest.raises(InvalidTransition):
                expected.connection.accept()

    @precondition(lambda self: self.all)
    @rule(choice=st.integers(min_value=0, max_value=3))
    def refuse(self, choice: int) -> None:
        expected = self._choose(choice)
        if self._move(expected, "refuse"):
            expected.connection.refuse()
        else:
            with pytest.raises(InvalidTransition):
                expected.connection.refuse()

    @precondition(lambda self: self.all)
    @rule(choice=st.integers(min_value=0, max_value=3))
    def shake_hands(self, choice: int) -> None:
        expected = self._choose(choice)
        assert expected.connection.shake_hands() == self._move(expected, "shake")

    @precondition(lambda self: self.all)
    @rule(choice=st.integers(min_value=0, max_value=3), reason=st.sampled_from([CLIENT, SERVER]))
    def close(self, choice: int, reason: str) -> None:
        expected = self._choose(choice)
        is_first = expected.state not in ("closing", "closed")
        if is_first:
            expected.reason = reason
        self._move(expected, "close")
        assert expected.connection.begin_close(reason) is is_first

    @precondition(lambda self: self.all)
    @rule(choice=st.integers(min_value=0, max_value=3))
    def finish(self, choice: int) -> None:
        expected = self._choose(choice)
        if self._move(expected, "finish"):
            expected.connection.finish()
        else:
            with pytest.raises(InvalidTransition):
                expected.connection.finish()

    @precondition(lambda self: self.all)
    @rule(choice=st.integers(min_value=0, max_value=3))
    def defer(self, choice: int) -> None:
        expected = self._choose(choice)
        self.number += 1
        number = self.number
        expected.connection.defer(lambda: self.released.append(number))
        if expected.state == "closed":
            self.expected_releases.append(number)
        else:
            expected.deferred.append(number)

    @invariant()
    def the_books_are_right(self) -> None:
        connections = self.registry.connections
        here = {sid: each for sid, each in self.all.items() if each.state != "closed"}
        assert dict(connections) == {sid: each.connection for sid, each in here.items()}
        assert list(connections) == list(here)
        assert len(connections) == len(here)
        for eio_sid in ("x", "y"):
            own = tuple(each.connection for each in here.values() if each.eio_sid == eio_sid)
            assert connections.of(eio_sid) == own
        counts = Counter((each.state, each.namespace) for each in here.values())
        for state in (*STATES, "closed"):
            for namespace in ("/", "/chat"):
                assert connections.count(state, namespace) == counts[state, namespace]
            assert connections.count(state) == counts[state, "/"] + counts[state, "/chat"]
        assert connections.count() == len(here)

    @invariant()
    def each_is_in_the_state_that_it_should_be_in(self) -> None:
        for expected in self.all.values():
            connection = expected.connection
            assert str(connection.state) == expected.state
            assert connection.reason == expected.reason
            assert connection.is_open == (expected.state in ("open", "ready"))
            assert connection.is_ready == (expected.state == "ready")

    @invariant()
    def all_was_told_and_released_in_order(self) -> None:
        assert self.registry.told == self.told
        assert self.released == self.expected_releases
        assert self.registry.failures == []


TestConnectionsWalk = ConnectionsWalk.TestCase
TestConnectionsWalk.settings = settings(
    max_examples=examples(30),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# In an application


@dataclass
class Watched:
    """An application whose connect handler waits, and what its handlers heard."""

    guarded: Guarded
    is_let_in: bool = True
    heard: list[tuple[str, str]] = field(default_factory=list)
    changes: list[tuple[str | None, str]] = field(default_factory=list)
    released: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_connecting = threading.Event()
        self.may_go_on = threading.Event()
        self.may_leave = threading.Event()
        self.may_leave.set()
        self.guarded.socketio.on_event("connect", self._connect)
        self.guarded.socketio.on_event("disconnect", self._disconnect)
        self._subscription = signals.subscribe(
            signals.connection_changed,
            self.guarded.app,
            lambda change: self.changes.append((change.old and str(change.old), str(change.new))),
        )

    def _connect(self) -> bool:
        sid = flask.request.sid  # type: ignore[attr-defined]
        self.guarded.guard.connections[sid].defer(lambda: self.released.append(sid))
        self.is_connecting.set()
        assert self.may_go_on.wait(5.0)
        return self.is_let_in

    def _disconnect(self, reason: str) -> None:
        self.heard.append(("disconnect", reason))
        assert self.may_leave.wait(5.0)

    def begin(self) -> tuple[PollingClient, threading.Thread]:
        """Let a client come, until its connect handler runs."""
        client = self.guarded.polling()
        client.eio_sid = json.loads(client.handshake().get_data(as_text=True)[1:])["sid"]
        joining = in_thread(lambda: client.send("40"))
        assert self.is_connecting.wait(5.0)
        return client, joining

    def wait_until_gone(self) -> None:
        inner = self.guarded.inner
        wait_until(lambda: inner.is_quiet(), message="something is left of the client")
        assert len(self.guarded.guard.connections) == 0


@pytest.fixture
def watched(guarded: Guarded) -> Watched:
    return Watched(guarded)


@pytest.mark.parametrize("is_let_in", [True, False], ids=["let in", "refused"])
def test_a_client_that_leaves_a_slow_connect_handler_is_disconnected_if_it_was_let_in(
    watched: Watched, is_let_in: bool
) -> None:
    watched.is_let_in = is_let_in
    client, joining = watched.begin()
    client.leave()
    wait_until(lambda: ("connecting", "closing") in watched.changes)
    assert watched.heard == []
    watched.may_go_on.set()
    joining.join(5.0)
    watched.wait_until_gone()
    assert watched.heard == ([("disconnect", CLIENT)] if is_let_in else [])
    assert len(watched.released) == 1
    assert watched.changes == [
        (None, "connecting"),
        ("connecting", "closing"),
        ("closing", "closed"),
    ]


def test_a_client_that_leaves_in_the_moment_in_which_it_is_let_in_is_disconnected_once(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads change places between the close and whatever is made of it."""
    client, joining = watched.begin()
    begin_close = Connection.begin_close

    def close(connection: Connection, reason: str) -> bool:
        is_first = begin_close(connection, reason)
        watched.may_go_on.set()
        wait_until(lambda: watched.heard, message="the disconnect handler does not run")
        return is_first

    monkeypatch.setattr(Connection, "begin_close", close)
    watched.may_leave.clear()
    client.leave()
    wait_until(lambda: watched.heard)
    wait_until(lambda: len(watched.heard) > 1 or not watched.guarded.inner.jobs.running)
    watched.may_leave.set()
    joining.join(5.0)
    watched.wait_until_gone()
    assert watched.heard == [("disconnect", CLIENT)]
    assert len(watched.released) == 1
    counters = watched.guarded.guard.counters
    assert [name for name, count in counters.items() if count and "failures" in name] == []
