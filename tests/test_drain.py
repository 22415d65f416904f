"""The clients of a process that ends are let go, not all at once, and not for ever."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flask_socketio_guard.clients import drain as drain_module
from flask_socketio_guard.clients.drain import Drain
from flask_socketio_guard.config import GuardConfig
from flask_socketio_guard.core.runtime import Runtime, ThreadRuntime, clock
from flask_socketio_guard.telemetry import records as signals
from flask_socketio_guard.upstream import close_for_restart
from tests.support import unit_support, wait_until
from tests.support.unit_support import FakeClock, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_support import Guarded, PollingClient

nothing_left_behind = unit_support.nothing_left_behind
runtime = unit_support.runtime
make_guarded = unit_support.make_guarded
guarded = unit_support.guarded

STEP = 0.05


class Socket:
    """A transport session that notes how it was closed."""

    server = SimpleNamespace(reason=SimpleNamespace(SERVER_DISCONNECT="server disconnect"))

    def __init__(self, draining: Draining, number: int) -> None:
        self.draining = draining
        self.number = number

    def close(self, **how: Any) -> None:
        self.draining.closed.append((self.draining.now(), self.number, how))
        self.draining.sockets.pop(self.number, None)


class SteppingRuntime(ThreadRuntime):
    """Threads whose sleep only moves a fake clock."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.sleeps: list[float] = []
        self.on_sleep: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.clock.advance(seconds)
        self.on_sleep()


@dataclass
class Draining:
    """A drain of sockets that only look like it."""

    runtime: Runtime
    count: int = 0
    delay: float = 0.0
    window: float = 0.0
    now: Callable[[], float] = clock
    closed: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    is_busy: bool = False
    is_stopped: bool = False

    def __post_init__(self) -> None:
        self.sockets = {number: Socket(self, number) for number in range(self.count)}
        self.drain = Drain(
            self.runtime,
            GuardConfig(drain_delay=self.delay, drain_window=self.window),
            sockets=lambda: self.sockets.values(),
            close=close_for_restart,
            is_quiet=lambda: not self.is_busy,
            is_stopped=lambda: self.is_stopped,
        )

    @property
    def numbers(self) -> list[int]:
        return [number for _, number, _ in self.closed]

    def batches(self) -> list[int]:
        """Return how many were closed at each instant."""
        sizes: dict[float, int] = {}
        for at, _, _ in self.closed:
            sizes[at] = sizes.get(at, 0) + 1
        return list(sizes.values())

    def in_background(self, timeout: float) -> Background:
        return Background(self, timeout)


class Background:
    """A drain that somebody else runs."""

    def __init__(self, draining: Draining, timeout: float) -> None:
        self.answers: list[bool] = []
        self.job = draining.runtime.spawn(
            lambda: self.answers.append(draining.drain.drain(timeout)), name="draining"
        )

    def answer(self) -> bool:
        assert self.job.join(5.0), "the drain does not end"
        assert self.job.exception is None
        return self.answers[0]


@pytest.fixture
def make_stepping(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Draining]:
    """Return a function that makes a drain in a time that moves only when somebody sleeps."""
    fake = FakeClock()
    monkeypatch.setattr(drain_module, "clock", fake)

    def make(count: int = 0, **options: Any) -> Draining:
        return Draining(SteppingRuntime(fake), count, now=fake, **options)

    return make


def sleeps(draining: Draining) -> list[float]:
    assert isinstance(draining.runtime, SteppingRuntime)
    return draining.runtime.sleeps


# Letting go


def test_clients_are_told_that_the_service_restarts(
    make_stepping: Callable[..., Draining],
) -> None:
    """Theirs is to come back: to another process, or to the next one here."""
    draining = make_stepping(3)
    assert draining.drain.drain(1.0)
    assert sorted(draining.numbers) == [0, 1, 2]
    for _, _, how in draining.closed:
        assert how == {"reason": "server disconnect", "code": 1012, "text": "service restart"}


def test_a_process_without_clients_is_drained_at_once(
    make_stepping: Callable[..., Draining],
) -> None:
    draining = make_stepping(0, window=60.0)
    assert draining.drain.drain(5.0)
    assert sum(sleeps(draining)) == 0.0


def test_the_delay_comes_first(make_stepping: Callable[..., Draining]) -> None:
    """A load balancer has to hear of it before clients come back through it."""
    draining = make_stepping(2, delay=3.0)
    began_at = draining.now()
    assert draining.drain.drain(1.0)
    assert [at for at, _, _ in draining.closed] == [began_at + 3.0] * 2


@pytest.mark.parametrize(
    ("count", "window", "batches"),
    [
        (1000, 1.0, [50] * 20),
        (100, 0.2, [25] * 4),
        (101, 0.2, [26, 26, 26, 23]),
        (99, 0.2, [25, 25, 25, 24]),
        (3, 1.0, [1, 1, 1]),
        (20, 1.0, [1] * 20),
        (100, 0.0, [100]),
        (100, 0.01, [100]),
        (100, 0.05, [100]),
        (100, 0.06, [50, 50]),
        (1, 1.0, [1]),
    ],
)
def test_clients_are_let_go_in_batches_over_the_window(
    make_stepping: Callable[..., Draining], count: int, window: float, batches: list[int]
) -> None:
    draining = make_stepping(count, window=window)
    assert draining.drain.drain(1.0)
    assert draining.batches() == batches
    assert sorted(draining.numbers) == list(range(count))
    pauses = sleeps(draining)[1:]
    assert len(pauses) == len(batches) - 1
    assert all(0.5 * STEP <= pause <= 1.5 * STEP for pause in pauses)
    assert draining.now() - FakeClock().now <= 1.5 * window


def test_the_pauses_between_batches_are_not_all_the_same(
    make_stepping: Callable[..., Draining],
) -> None:
    """Several processes that are told to stop at once shall not go in step."""
    draining = make_stepping(100, window=2.0)
    draining.drain.drain(1.0)
    pauses = sleeps(draining)[1:]
    assert len(set(pauses)) > 10
    assert min(pauses) < 0.9 * STEP < 1.1 * STEP < max(pauses)


def test_clients_go_in_any_order(make_stepping: Callable[..., Draining]) -> None:
    """Those that came together, from one place, do not all go together."""
    draining = make_stepping(200)
    draining.drain.drain(1.0)
    assert draining.numbers != sorted(draining.numbers)
    assert sorted(draining.numbers) == list(range(200))


# Waiting


def test_a_drain_waits_until_nothing_is_left(make_stepping: Callable[..., Draining]) -> None:
    draining = make_stepping(2)
    draining.is_busy = True
    began_at = draining.now()

    def end_later() -> None:
        if draining.now() - began_at > 0.5:
            draining.is_busy = False

    draining.runtime.on_sleep = end_later  # type: ignore[attr-defined]
    assert draining.drain.drain(1.0)
    assert 0.5 < draining.now() - began_at < 0.6
    assert draining.drain.is_over


def test_a_drain_waits_no_longer_than_it_may(make_stepping: Callable[..., Draining]) -> None:
    """The time that clients take to go is not part of it."""
    draining = make_stepping(20, delay=2.0, window=1.0)
    draining.is_busy = True
    assert not draining.drain.drain(3.0)
    last_closed_at = draining.closed[-1][0]
    assert 3.0 < draining.now() - last_closed_at < 3.1
    assert draining.drain.is_over


def test_a_drain_that_may_not_wait_still_lets_clients_go(
    make_stepping: Callable[..., Draining],
) -> None:
    draining = make_stepping(5)
    draining.is_busy = True
    assert not draining.drain.drain(0.0)
    assert len(draining.closed) == 5
    draining = make_stepping(5)
    assert draining.drain.drain(0.0)


def test_an_end_lets_nobody_wait(runtime: Runtime) -> None:
    draining = Draining(runtime, count=3)
    draining.is_busy = True
    background = draining.in_background(60.0)
    wait_for(runtime, lambda: len(draining.closed) == 3)
    assert not draining.drain.is_over
    began_at = clock()
    draining.is_stopped = True
    assert background.answer() is False
    assert clock() - began_at < 1.0
    assert draining.drain.is_over


def test_a_drain_that_comes_after_the_end_lets_clients_go_and_does_not_wait(
    make_stepping: Callable[..., Draining],
) -> None:
    draining = make_stepping(3)
    draining.is_busy = True
    draining.is_stopped = True
    assert not draining.drain.drain(60.0)
    assert len(draining.closed) == 3
    assert sum(sleeps(draining)) == 0.0
    draining = make_stepping(3)
    draining.is_stopped = True
    assert draining.drain.drain(60.0), "nothing was left, whoever waits"


# Twice


@pytest.mark.parametrize("is_busy", [False, True])
def test_whoever_comes_second_waits_for_the_first(runtime: Runtime, is_busy: bool) -> None:
    draining = Draining(runtime, count=10, window=0.2)
    draining.is_busy = is_busy
    first = draining.in_background(0.1)
    wait_for(runtime, lambda: draining.closed)
    second = draining.in_background(0.1)
    third = draining.in_background(0.1)
    assert not draining.drain.is_over
    answers = [each.answer() for each in (first, second, third)]
    assert answers == [not is_busy] * 3
    assert sorted(draining.numbers) == list(range(10))


def test_whoever_comes_after_the_end_is_told_at_once(runtime: Runtime) -> None:
    for is_busy in (False, True):
        draining = Draining(runtime, count=1)
        draining.is_busy = is_busy
        assert draining.drain.drain(0.0) is not is_busy
        draining.is_busy = not is_busy
        began_at = clock()
        assert draining.drain.drain(60.0) is not is_busy
        assert clock() - began_at < 1.0
        assert len(draining.closed) == 1


class Unending:
    """An event that is never set, and for how long it was waited for."""

    def __init__(self) -> None:
        self.waits: list[float | None] = []

    def set(self) -> None:
        pytest.fail("it is over")

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return False


def test_whoever_comes_second_does_not_wait_for_ever(
    make_stepping: Callable[..., Draining],
) -> None:
    """But for as long as a drain of its own would have taken, and a second more."""
    draining = make_stepping(1, delay=2.0, window=4.0)
    over: Any = Unending()
    draining.drain._is_over = over
    draining.drain._has_begun = True
    assert draining.drain.drain(8.0) is False
    assert over.waits == [2.0 + 4.0 + 8.0 + 1.0]
    assert draining.closed == []


def test_a_drain_that_fails_leaves_nobody_waiting(runtime: Runtime) -> None:
    draining = Draining(runtime)

    def fail() -> bool:
        raise RuntimeError("boom")

    draining.drain._is_quiet = fail
    with pytest.raises(RuntimeError, match="boom"):
        draining.drain.drain(1.0)
    assert draining.drain.is_over
    began_at = clock()
    assert draining.drain.drain(60.0) is False
    assert clock() - began_at < 1.0


def test_nothing_is_over_before_it_began(runtime: Runtime) -> None:
    assert not Draining(runtime).drain.is_over


# In an application


@dataclass
class Served:
    """An application with clients, and what its handlers heard."""

    guarded: Guarded
    heard: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may_end = threading.Event()
        socketio = self.guarded.socketio
        socketio.on_event("disconnect", lambda reason: self.heard.append(reason))
        socketio.on_event("slow", self._slow)
        self._subscription = signals.subscribe(
            signals.handshake_refused,
            self.guarded.app,
            lambda record: self.refusals.append(record.reason),
        )

    def _slow(self) -> str:
        self.heard.append("began")
        assert self.may_end.wait(5.0)
        self.heard.append("ended")
        return "done"

    def connect(self, count: int) -> list[PollingClient]:
        clients = [self.guarded.polling() for _ in range(count)]
        for client in clients:
            client.connect()
        return clients

    def status(self, path: str) -> int:
        return self.guarded.app.test_client().get(path).status_code


@pytest.fixture
def serve(make_guarded: Callable[..., Guarded]) -> Callable[..., Served]:
    return lambda **settings: Served(make_guarded(**settings))


def test_the_clients_of_an_application_are_let_go(serve: Callable[..., Served]) -> None:
    served = serve(drain_window=0.2)
    guard, inner = served.guarded.guard, served.guarded.inner
    served.connect(8)
    assert served.status("/readyz") == 200
    assert not inner.lifecycle.is_drained
    began_at = time.monotonic()
    assert guard.drain(5.0)
    assert time.monotonic() - began_at < 2.0
    assert served.heard == ["server disconnect"] * 8
    assert len(guard.connections) == 0
    assert inner.lifecycle.is_drained
    assert inner.is_quiet()
    assert not served.guarded.socketio.server.eio.sockets
    assert (served.status("/livez"), served.status("/readyz")) == (200, 503)
    counters = guard.counters
    assert (counters["connections_opened"], counters["connections_closed"]) == (8, 8)
    assert (counters["handler_failures"], counters["task_failures"]) == (0, 0)


def test_new_clients_are_refused_from_the_first_instant(serve: Callable[..., Served]) -> None:
    served = serve(drain_delay=0.4, drain_window=0.0)
    (client,) = served.connect(1)
    draining = threading.Thread(target=served.guarded.guard.drain, args=[5.0])
    draining.start()
    wait_until(lambda: served.status("/readyz") == 503, timeout=0.3)
    answer = served.guarded.polling().handshake()
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert served.refusals == ["draining"]
    # Those that are here are served until their turn comes.
    assert served.heard == []
    client.send("3")
    draining.join(5.0)
    assert served.heard == ["server disconnect"]


def test_a_client_that_waits_for_news_is_sent_away(serve: Callable[..., Served]) -> None:
    """With an error: after a plain close a browser would not come back by itself."""
    served = serve(drain_window=0.0)
    (client,) = served.connect(1)
    statuses: list[int] = []
    url = f"/socket.io/?EIO=4&transport=polling&sid={client.eio_sid}"
    polling = threading.Thread(target=lambda: statuses.append(served.status(url)))
    polling.start()
    socket = served.guarded.socketio.server.eio.sockets[client.eio_sid]
    wait_until(lambda: socket._poll is not None)
    assert served.guarded.guard.drain(5.0)
    polling.join(5.0)
    assert statuses == [400]
    assert served.status(url) == 400


def test_handlers_that_run_may_end(serve: Callable[..., Served]) -> None:
    served = serve(drain_window=0.0)
    (client,) = served.connect(1)
    client.send('421["slow"]')
    wait_until(lambda: served.heard == ["began"])
    answers: list[bool] = []
    draining = threading.Thread(target=lambda: answers.append(served.guarded.guard.drain(5.0)))
    draining.start()
    wait_until(lambda: "server disconnect" in served.heard)
    assert answers == []
    served.may_end.set()
    draining.join(5.0)
    assert answers == [True]
    assert served.heard == ["began", "server disconnect", "ended"]


def test_a_handler_that_does_not_end_is_left_behind(serve: Callable[..., Served]) -> None:
    served = serve(drain_window=0.0)
    (client,) = served.connect(1)
    client.send('421["slow"]')
    wait_until(lambda: served.heard == ["began"])
    began_at = time.monotonic()
    assert not served.guarded.guard.drain(0.1)
    assert time.monotonic() - began_at < 2.0
    assert "server disconnect" in served.heard
    served.may_end.set()
    wait_until(served.guarded.inner.is_quiet)


def test_a_client_on_its_way_in_when_the_drain_begins_is_let_go_as_well(
    serve: Callable[..., Served],
) -> None:
    """It was let in before; what stands between that and its session may take its time."""
    served = serve(drain_window=0.0)
    (client,) = served.connect(1)
    client.send('421["slow"]')
    wait_until(lambda: served.heard == ["began"])
    engine = served.guarded.socketio.server.eio
    is_in, may_go_on = threading.Event(), threading.Event()
    handle_request = engine.handle_request

    def slow(environ: Any, start_response: Any) -> Any:
        is_in.set()
        assert may_go_on.wait(5.0)
        return handle_request(environ, start_response)

    engine.handle_request = slow
    coming = threading.Thread(target=lambda: served.guarded.polling().handshake())
    coming.start()
    assert is_in.wait(5.0)
    answers: list[bool] = []
    draining = threading.Thread(target=lambda: answers.append(served.guarded.guard.drain(2.0)))
    draining.start()
    wait_until(lambda: "server disconnect" in served.heard)
    may_go_on.set()
    coming.join(5.0)
    served.may_end.set()
    draining.join(5.0)
    assert list(engine.sockets) == []
    assert answers == [True]
