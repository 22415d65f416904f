"""Handlers and their tasks, on real servers: what applications may do there, as on stock."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import socketio as python_socketio
from flask import Flask
from flask_socketio import ConnectionRefusedError, Namespace, SocketIO

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.core.runtime import GeventRuntime
from flask_socketio_guard.telemetry import records as signals
from tests.support import unit_support, unit_websocket
from tests.support.unit_support import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.unit_websocket import Served

nothing_left_behind = unit_support.nothing_left_behind
stop_guards = unit_support.stop_guards
make_served = unit_websocket.make_served

both_modes = pytest.mark.parametrize("kind", ["gevent-websocket", "threads"])


# Handlers that Flask-SocketIO knows nothing of


class Native(python_socketio.Namespace):
    """One of python-socketio's own, whose handlers are as old as they may be."""

    def __init__(self, log: list[str]) -> None:
        super().__init__("/")
        self.log = log

    def on_connect(self, sid: str, environ: dict[str, Any]) -> None:
        self.log.append("connect")

    def on_disconnect(self, sid: str) -> None:
        self.log.append("disconnect")


class Everything(python_socketio.Namespace):
    """One that takes all events in one place."""

    def __init__(self, log: list[str]) -> None:
        super().__init__("/")
        self.log = log

    def trigger_event(self, event: str, *args: Any) -> None:
        self.log.append(f"{event} {len(args)}")


def register_old(served: Served, log: list[str]) -> None:
    server = served.socketio.server
    server.on("connect", lambda sid, environ: log.append("connect"))
    server.on("disconnect", lambda sid: log.append("disconnect"))


def register_new(served: Served, log: list[str]) -> None:
    server = served.socketio.server
    server.on("connect", lambda sid, environ, auth: log.append("connect"))
    server.on("disconnect", lambda sid, reason: log.append("disconnect"))


def register_any(served: Served, log: list[str]) -> None:
    server = served.socketio.server
    server.on("connect", lambda *args: log.append(f"connect {len(args)}"))
    server.on("disconnect", lambda *args: log.append(f"disconnect {len(args)}"))


def register_namespace(served: Served, log: list[str]) -> None:
    served.socketio.server.register_namespace(Native(log))


def register_everything(served: Served, log: list[str]) -> None:
    served.socketio.server.register_namespace(Everything(log))


@pytest.mark.parametrize("auth", ["", '{"token":1}'], ids=["no-auth", "auth"])
@pytest.mark.parametrize(
    ("register", "expected"),
    [
        (register_old, ["connect", "disconnect"]),
        (register_new, ["connect", "disconnect"]),
        (register_any, ["connect 3", "disconnect 2"]),
        (register_namespace, ["connect", "disconnect"]),
        (register_everything, ["connect 3", "disconnect 2"]),
    ],
)
def test_handlers_of_python_socketio_have_the_arguments_that_they_take(
    make_served: Callable[..., Served],
    auth: str,
    register: Callable[[Served, list[str]], None],
    expected: list[str],
) -> None:
    """Stock refuses a client with authentication whose handler takes none."""
    served = make_served()
    log: list[str] = []
    register(served, log)
    peer = served.websocket()
    peer.read_until("0{")
    peer.send(f"40{auth}")
    assert peer.read_until("4").startswith("40{")
    peer.send("41")
    wait_for(served.runtime, lambda: len(log) == 2)
    assert log == expected


def test_a_disconnect_handler_does_not_wait_for_handlers_of_python_socketio(
    make_served: Callable[..., Served],
) -> None:
    """It may be what ends them."""
    served = make_served()
    is_over = gevent.event.Event()
    log: list[str] = []

    def run(sid: str) -> None:
        log.append("begun")
        is_over.wait()
        log.append("ended")

    def leave(sid: str, reason: str) -> None:
        log.append("disconnect")
        is_over.set()

    served.socketio.server.on("run", run)
    served.socketio.server.on("disconnect", leave)
    peer = served.joined()
    peer.send('42["run"]', "41")
    wait_for(served.runtime, lambda: len(log) == 3)
    assert log == ["begun", "disconnect", "ended"]


class Retrying(Namespace):
    """A namespace that tries again, or does something else."""

    def __init__(self) -> None:
        super().__init__("/")
        self.runs = 0

    def trigger_event(self, event: str, *args: Any) -> Any:
        try:
            return super().trigger_event(event, *args)
        except LookupError:
            name = "instead" if event == "fail" else event
            return super().trigger_event(name, *args)

    def on_fail(self) -> None:
        raise LookupError

    def on_instead(self) -> str:
        return "instead"

    def on_flaky(self) -> str:
        self.runs += 1
        if self.runs == 1:
            raise LookupError
        return "second try"


def test_whoever_overrides_trigger_event_may_fall_back_and_try_again(
    make_served: Callable[..., Served],
) -> None:
    served = make_served()
    served.socketio.on_namespace(Retrying())
    peer = served.joined()
    peer.send('421["fail"]')
    assert peer.read_until("43") == '431["instead"]'
    peer.send('422["flaky"]')
    assert peer.read_until("43") == '432["second try"]'


# Connecting


@both_modes
def test_a_connect_handler_that_takes_too_long_is_told_so(
    make_served: Callable[..., Served], kind: str
) -> None:
    served = make_served(kind, connect_timeout=0.2)
    failures = served.collect(signals.failed)
    served.socketio.on_event("connect", lambda: served.runtime.sleep(0.6))
    peer = served.websocket()
    peer.read_until("0{")
    peer.send("40")
    assert '"code":"timeout"' in peer.read_until("44")
    assert [failure.code for failure in failures] == ["timeout"]
    served.runtime.sleep(0.5)  # a thread cannot be interrupted


@pytest.mark.parametrize("is_guarded", [False, True], ids=["stock", "guarded"])
@both_modes
def test_a_connect_handler_runs_in_the_thread_of_the_test_client(
    kind: str, is_guarded: bool, stop_guards: None
) -> None:
    """What belongs to a thread, such as a connection of sqlite3, can be had in both."""
    app = Flask("tested")
    socketio = SocketIO(app, async_mode="threading" if kind == "threads" else "gevent")
    if is_guarded:
        SocketIOGuard(app, socketio, blocking_timeout=None)
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        rows: list[object] = []
        socketio.on_event("connect", lambda: rows.extend(database.execute("select 1")))
        assert socketio.test_client(app).is_connected()
    assert rows == [(1,)]


def test_a_client_that_always_connects_is_refused_with_what_json_cannot_hold(
    make_served: Callable[..., Served],
) -> None:
    """Stock tells it nothing, and remembers it for ever."""
    served = make_served(options={"always_connect": True})

    def refuse() -> None:
        raise ConnectionRefusedError("no", datetime.datetime.now(datetime.timezone.utc))

    served.socketio.on_event("connect", refuse)
    peer = served.websocket()
    peer.read_until("0{")
    peer.send("40")
    peer.read_until("40")
    assert peer.read_until("41") == '41{"message":"Connection rejected by server"}'
    assert list(served.inner.connections) == []


# The order of events


@both_modes
def test_events_of_a_client_begin_in_order_however_many_there_are(
    make_served: Callable[..., Served], kind: str
) -> None:
    """Those that have waited, too, although others come meanwhile."""
    served = make_served(kind, max_in_flight=8)
    begun: list[int] = []

    def note(number: int) -> int:
        begun.append(number)
        served.runtime.sleep(0.001 * (number % 3))
        return number

    served.socketio.on_event("note", note)
    peer = served.joined()
    for first in range(0, 200, 10):
        peer.send(*(f'42["note",{number}]' for number in range(first, first + 10)))
        served.runtime.sleep(0.002)
    wait_for(served.runtime, lambda: len(begun) == 200)
    late = sum(later < earlier for earlier, later in itertools.pairwise(begun))
    # The threads of an operating system may begin in another order than they are started in.
    assert late <= (10 if kind == "threads" else 0)


def test_events_over_polling_are_in_order_where_handlers_run_one_by_one(
    make_served: Callable[..., Served],
) -> None:
    """Also behind those that were sent while the connect handler ran."""
    options = {"always_connect": True, "async_handlers": False}
    served = make_served(options=options)
    may_connect = gevent.event.Event()
    log: list[str] = []

    def note(number: int) -> None:
        log.append(f"begin {number}")
        gevent.sleep(0.05)
        log.append(f"end {number}")

    served.socketio.on_event("connect", lambda: may_connect.wait() and None)
    served.socketio.on_event("note", note)
    client = served.polling()
    joining = gevent.spawn(client.post, "40")
    while not client.get().text.startswith("40"):
        pass
    client.post('42["note",1]', '42["note",2]')
    may_connect.set()
    joining.join()
    client.post('42["note",3]')
    wait_for(served.runtime, lambda: len(log) == 6)
    assert log == [f"{what} {number}" for number in (1, 2, 3) for what in ("begin", "end")]


def test_events_that_have_waited_are_started_by_start_background_task(
    make_served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever overrides it sees all."""

    class Own(python_socketio.Server):  # type: ignore[misc]
        started = 0

        def start_background_task(self, *args: Any, **kwargs: Any) -> Any:
            Own.started += 1
            return super().start_background_task(*args, **kwargs)

    monkeypatch.setattr("flask_socketio.socketio.Server", Own)
    served = make_served(max_in_flight=4)
    done: list[int] = []
    served.socketio.on_event("note", done.append)
    peer = served.joined()
    before = Own.started
    peer.send(*(f'42["note",{number}]' for number in range(50)))
    wait_for(served.runtime, lambda: len(done) == 50)
    assert Own.started - before == 50


# Tasks


@pytest.fixture
def spawn_callback() -> Iterator[list[Callable[[], object]]]:
    """What is called for each greenlet that is started, once."""
    calls: list[Callable[[], object]] = []

    def call(_greenlet: object) -> None:
        if calls:
            calls.pop()()

    gevent.Greenlet.add_spawn_callback(call)
    yield calls
    gevent.Greenlet.remove_spawn_callback(call)


def test_a_spawn_callback_that_raises_or_waits_costs_no_event(
    make_served: Callable[..., Served],
    spawn_callback: list[Callable[[], object]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = make_served()
    peer = served.joined()

    def fail() -> None:
        raise RuntimeError("a spawn callback")

    for number, call in enumerate((fail, lambda: gevent.sleep(0.01))):
        spawn_callback.append(call)
        peer.send(f'42{number}["echo"]')
        assert peer.read_until("43") == f"43{number}[]"
    peer.send('429["echo"]')
    assert peer.read_until("43") == "439[]"
    assert "a spawn callback of gevent failed" in caplog.text


def test_a_spawn_callback_that_fails_between_two_turns_costs_no_task(
    spawn_callback: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_socketio_guard.core.runtime_greenlets.TIME_SLICE", 1e-4)

    def fail() -> None:
        raise RuntimeError("a spawn callback")

    runtime = GeventRuntime()
    all_done = runtime.flag()
    spawn_callback += [fail] * 4
    for _ in range(2):
        runtime.start(lambda: time.sleep(2e-4))  # for longer than a turn
    runtime.start(all_done.set)
    assert all_done.wait(5)


def test_a_slow_disconnect_handler_holds_no_native_thread_up(
    make_served: Callable[..., Served],
) -> None:
    served = make_served()
    may_end = served.runtime.flag()
    served.socketio.on_event("disconnect", lambda *_: may_end.wait())
    leaving, other = served.joined(), served.joined()
    sids = list(served.inner.connections)

    def act() -> None:
        served.socketio.server.disconnect(sids[0], namespace="/")
        served.socketio.emit("news", 1, to=sids[1])

    thread = threading.Thread(target=act)
    thread.start()
    assert other.read_until("42") == '42["news",1]'
    may_end.set()
    leaving.vanish()
    thread.join()


def test_the_event_loop_itself_may_disconnect_a_client(make_served: Callable[..., Served]) -> None:
    """A timer of gevent calls what it is given in the hub, which may not wait."""
    served = make_served()
    log: list[str] = []
    served.socketio.on_event("disconnect", lambda *_: log.append("disconnect"))
    served.joined()
    (sid,) = served.inner.connections
    timer = gevent.get_hub().loop.timer(0.01)
    timer.start(served.socketio.server.disconnect, sid, "/")
    wait_for(served.runtime, lambda: log)
    timer.close()
    assert log == ["disconnect"]


def test_a_polling_client_that_vanishes_while_much_waits_is_missed(
    make_served: Callable[..., Served],
) -> None:
    """Its handlers may hang until their disconnect handler frees them."""
    served = make_served(
        options={"ping_interval": 0.3, "ping_timeout": 0.3},
        max_in_flight=2,
        max_waiting_bytes=2000,
        departure_timeout=0.3,
    )
    may_end = served.runtime.flag()
    served.socketio.on_event("hang", lambda: may_end.wait())
    served.socketio.on_event("disconnect", lambda *_: may_end.set())
    client = served.polling()
    client.join()
    body = "\x1e".join(['42["hang"]'] * 30).encode()
    head = f"POST {client.path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    sock = served.connect()
    sock.sendall(head.encode() + body)
    wait_for(served.runtime, may_end.is_set)
    sock.close()
