"""Fixtures of the unit tests: both runtimes, guarded applications, and nothing left behind.

A test module takes the fixtures that it needs by name: ``runtime = unit_support.runtime``.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from flask import Flask
from flask_socketio import SocketIO
from socketio import PubSubManager

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.app_guard import AppGuard, all_guards
from flask_socketio_guard.core.runtime import GeventRuntime, Runtime, ThreadRuntime
from flask_socketio_guard.errors import PublishError
from flask_socketio_guard.states import ListenerState
from tests.support import wait_until
from tests.support.waiting import USUAL_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flask.testing import FlaskClient

    from flask_socketio_guard.queue.transport import QueueMessage

# Engine.IO's own threads sleep for up to 25 s after their connection has ended.
_UPSTREAM_THREADS = ("_send_ping", "_service_task")
_LEFT_BEHIND_TIMEOUT = 10.0


def wait_for(
    runtime: Runtime,
    condition: Callable[[], object],
    *,
    timeout: float = USUAL_TIMEOUT,
    message: str = "the condition did not come true",
) -> None:
    """Wait until *condition* holds, and let the greenlets or threads of *runtime* run."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{message} (waited {timeout:g} s)"
        runtime.sleep(0.005)


@contextlib.contextmanager
def busy_socket(note: Callable[[], object]) -> Iterator[None]:
    """Have *note* called each time that gevent's loop looks at its sockets."""
    here, there = gevent.socket.socketpair()

    def read() -> None:
        while True:
            gevent.socket.wait_read(here.fileno())
            note()

    with here, there:
        there.send(b"x")
        reader = gevent.spawn(read)
        try:
            yield
        finally:
            reader.kill()


def longest_run_without(log: list[object], mark: object) -> int:
    """Return how many entries at most there are between two marks."""
    runs = [0]
    for entry in log:
        if entry == mark:
            runs.append(0)
        else:
            runs[-1] += 1
    return max(runs)


class FakeClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakePublisher:
    """A :class:`flask_socketio_guard.queue.transport.Publisher` that fails as it is told to.

    Attributes:
        taken: What the broker has acknowledged, in order.
        calls: Every call: the sequence numbers of its messages, and its probe.
        script: What the next calls do, first to last: an exception to raise, a number of
            subscribers to return, or ``None``.
        subscribers: Returned when the script is over.
        is_down: Whether every call fails when the script is over.
    """

    def __init__(self) -> None:
        self.taken: list[QueueMessage] = []
        self.calls: list[tuple[list[int], int | None]] = []
        self.script: list[Exception | int | None] = []
        self.subscribers: int | None = 2
        self.is_down = False
        self.closed = 0
        self.before_answer: Callable[[], object] = lambda: None

    def publish(self, messages: Sequence[QueueMessage], probe: int | None) -> int | None:
        self.calls.append(([message.sequence for message in messages], probe))
        self.before_answer()
        step = self.script.pop(0) if self.script else self.subscribers
        if not isinstance(step, Exception) and self.is_down:
            step = PublishError("the broker is down")
        if isinstance(step, PublishError):
            self.taken += messages[: step.published]
        if isinstance(step, Exception):
            raise step
        self.taken += messages
        return step

    def close(self) -> None:
        self.closed += 1


class Bus:
    """What several :class:`BusManager` share; each stands for a process of its own.

    Attributes:
        is_down: Whether publishing fails.
        is_to_return: Whether each ``_listen`` returns at its next message.
    """

    def __init__(self) -> None:
        self.queues: list[queue.SimpleQueue[Any]] = []
        self.published: list[Any] = []
        self.is_down = False
        self.is_to_return = False

    def publish(self, data: Any) -> None:
        if self.is_down:
            raise RuntimeError("the bus is down")
        self.published.append(data)
        self.send(data)

    def send(self, data: Any) -> None:
        """Hand *data* to everyone who listens, as a stranger on the channel would."""
        for each in list(self.queues):
            each.put(data)

    def methods(self) -> list[str]:
        """Return the methods of the messages that went over, without the probes."""
        names = [data["method"] for data in self.published]
        return [name for name in names if name != "guard_probe"]


class BusManager(PubSubManager):  # type: ignore[misc]
    """A message queue as an application may write one: two methods, in this process."""

    name = "bus"

    def __init__(self, bus: Bus, *, write_only: bool = False) -> None:
        super().__init__(channel="bus", write_only=write_only)
        self.bus = bus

    def _publish(self, data: dict[str, Any]) -> None:
        self.bus.publish(json.loads(json.dumps(data)))

    def _listen(self) -> Iterator[Any]:
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.bus.queues.append(arrived)
        try:
            while True:
                data = arrived.get()
                if self.bus.is_to_return:
                    return
                yield data
        finally:
            self.bus.queues.remove(arrived)


@pytest.fixture
def bus() -> Bus:
    """A message queue between the applications of :func:`make_process`."""
    return Bus()


@pytest.fixture
def make_process(
    make_guarded: Callable[..., Guarded], bus: Bus
) -> Iterator[Callable[..., Guarded]]:
    """Return a function that makes one more application on the bus, and waits until it listens.

    It takes the arguments of ``make_guarded``.
    """
    made: list[Guarded] = []

    def make(**options: Any) -> Guarded:
        upstream_options = {"client_manager": BusManager(bus), **options.pop("options", {})}
        guarded = make_guarded(options=upstream_options, **options)
        made.append(guarded)
        inner = guarded.inner
        inner.start()
        wait_until(
            lambda: inner.listener_state() is ListenerState.RUNNING,
            message="the listener does not run",
        )
        return guarded

    yield make
    bus.is_down = bus.is_to_return = False
    for guarded in made:
        # A listener that waits for its next message looks only then whether it shall stop.
        stopping = threading.Thread(target=guarded.inner.stop, args=[5.0])
        stopping.start()
        while stopping.is_alive():
            bus.send({"method": "wake up"})
            stopping.join(0.01)


def _threads() -> set[threading.Thread]:
    return {
        thread
        for thread in threading.enumerate()
        if not any(name in thread.name for name in _UPSTREAM_THREADS)
    }


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Fail if greenlets or threads that a test started outlive it."""
    threads = _threads()
    greenlets: weakref.WeakSet[gevent.Greenlet] = weakref.WeakSet()
    gevent.Greenlet.add_spawn_callback(greenlets.add)
    try:
        yield
        deadline = time.monotonic() + _LEFT_BEHIND_TIMEOUT
        while True:
            left = [
                *(thread.name for thread in _threads() - threads),
                *(repr(greenlet) for greenlet in greenlets if not greenlet.dead),
            ]
            if not left or time.monotonic() > deadline:
                break
            gevent.sleep(0.005)
    finally:
        gevent.Greenlet.remove_spawn_callback(greenlets.add)
    assert not left, f"left behind: {', '.join(left)}"


@pytest.fixture(params=[GeventRuntime, ThreadRuntime], ids=["gevent", "threads"])
def runtime(request: pytest.FixtureRequest, nothing_left_behind: None) -> Runtime:
    """Each runtime in turn."""
    runtime: Runtime = request.param()
    return runtime


@dataclass
class Guarded:
    """One guarded application in threading mode."""

    app: Flask
    socketio: SocketIO
    guard: SocketIOGuard

    @property
    def inner(self) -> AppGuard:
        """What guards the application."""
        return next(guard for guard in all_guards() if guard.app is self.app)

    def client(self, **options: Any) -> Any:
        """Return a connected test client of Flask-SocketIO."""
        return self.socketio.test_client(self.app, **options)

    def polling(self) -> PollingClient:
        """Return a client that speaks Engine.IO over HTTP."""
        return PollingClient(self.app)


@pytest.fixture
def make_guarded(nothing_left_behind: None) -> Iterator[Callable[..., Guarded]]:
    """Return a function that makes a guarded application; it takes settings of the guard.

    ``app``, ``socketio``, ``guard`` replace the parts of that name.
    """
    made: list[Guarded] = []

    def make(
        *,
        app: Flask | None = None,
        socketio: SocketIO | None = None,
        guard: SocketIOGuard | None = None,
        config: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Guarded:
        app = app or Flask("guarded")
        app.config.update(config or {})
        socketio = socketio or SocketIO()
        socketio.init_app(app, async_mode="threading", **(options or {}))
        guard = guard or SocketIOGuard()
        guard.init_app(app, socketio, **settings)
        made.append(Guarded(app, socketio, guard))
        return made[-1]

    yield make
    for guarded in made:
        guarded.inner.stop(2.0)


@pytest.fixture
def guarded(make_guarded: Callable[..., Guarded]) -> Guarded:
    """One guarded application in threading mode, with the default settings."""
    return make_guarded()


@pytest.fixture(autouse=True)
def stop_guards(nothing_left_behind: None) -> Iterator[None]:
    """Stop the guard of every application of a test."""
    before = set(all_guards())
    yield
    for guard in set(all_guards()) - before:
        guard.stop(2.0)


@dataclass
class PollingClient:
    """A Socket.IO client over Engine.IO's long polling, in this process, through WSGI."""

    app: Flask
    eio_sid: str = ""
    sid: str = ""
    frames: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._http: FlaskClient = self.app.test_client()

    def handshake(self, query: str = "") -> Any:
        """Send the first request of a connection and return the response."""
        return self._http.get(f"/socket.io/?EIO=4&transport=polling{query}")

    def connect(self, namespace: str = "/") -> str:
        """Connect to *namespace* and return the packet that answers."""
        if not self.eio_sid:
            self.eio_sid = json.loads(self.handshake().get_data(as_text=True)[1:])["sid"]
        prefix = "" if namespace == "/" else f"{namespace},"
        self.send(f"40{prefix}")
        answer = self.receive("40", "44")
        if answer.startswith("40"):
            self.sid = json.loads(answer[2 + len(prefix) :])["sid"]
        return answer

    def connect_too(self, namespace: str) -> None:
        """Connect to one more namespace; :attr:`sid` stays that of the first."""
        sid = self.sid
        assert self.connect(namespace).startswith("40")
        self.sid = sid

    def send(self, packet: str) -> None:
        """Send one packet."""
        response = self._http.post(
            f"/socket.io/?EIO=4&transport=polling&sid={self.eio_sid}", data=packet
        )
        assert response.status_code == 200, response.get_data(as_text=True)

    def receive(self, *prefixes: str) -> str:
        """Poll until a packet with one of *prefixes* is there, and return and forget it."""
        deadline = time.monotonic() + 5.0
        while True:
            for frame in self.frames:
                if frame.startswith(prefixes):
                    self.frames.remove(frame)
                    return frame
            assert time.monotonic() < deadline, f"no packet {prefixes}, but {self.frames}"
            response = self._http.get(f"/socket.io/?EIO=4&transport=polling&sid={self.eio_sid}")
            assert response.status_code == 200
            self.frames += response.get_data(as_text=True).split("\x1e")

    def call(self, event: str, *args: Any, ack_id: int = 1) -> list[Any]:
        """Send an event and return the arguments of its acknowledgement."""
        self.send(f"42{ack_id}{json.dumps([event, *args])}")
        return json.loads(self.receive(f"43{ack_id}[")[2 + len(str(ack_id)) :])  # type: ignore[no-any-return]

    def question(self) -> tuple[int, list[Any]]:
        """Wait for an event that asks for an acknowledgement; return its id and its content."""
        frame = self.receive("42")
        start = frame.index("[")
        return int(frame[2:start]), json.loads(frame[start:])

    def answer(self, ack_id: int, *args: Any) -> None:
        """Acknowledge an event of the server."""
        self.send(f"43{ack_id}{json.dumps(list(args))}")

    def leave(self) -> None:
        """Leave as a browser does that is closed: the Engine.IO connection ends."""
        with contextlib.suppress(AssertionError):
            self.send("1")
