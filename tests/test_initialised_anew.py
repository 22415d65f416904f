"""``SocketIO.init_app`` after the guard, and an ``init_app`` of the guard's that fails."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from flask_socketio import Namespace, SocketIO

from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.errors import ConfigError
from flask_socketio_guard.upstream.socketio.server import GuardedServer
from tests.support import unit_support, wait_until
from tests.support.unit_support import BusManager, PollingClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.unit_support import Bus

nothing_left_behind = unit_support.nothing_left_behind
stop_guards = unit_support.stop_guards
bus = unit_support.bus

SERVED = {"SERVER_SOFTWARE": "a server"}


def ask(app: Flask, event: str, *args: Any) -> list[Any]:
    """Return how a client's event is acknowledged."""
    client = PollingClient(app)
    assert client.connect().startswith("40")
    answer = client.call(event, *args)
    client.leave()
    return answer


def assert_protected(app: Flask) -> None:
    (error,) = ask(app, "bad")
    assert error["error"]["code"] == "internal_error"
    http = app.test_client()
    # Its tasks may not have begun yet.
    wait_until(lambda: http.get("/readyz").status_code == 200)
    assert "Connection" not in http.get("/").headers


@pytest.fixture
def socketio() -> SocketIO:
    """One of an application that registers its handlers before any application is there."""
    made = SocketIO(async_mode="threading")

    @made.on("bad")
    def bad() -> None:
        raise RuntimeError("boom")

    return made


def test_a_socketio_that_is_initialised_anew_stays_guarded(socketio: SocketIO, bus: Bus) -> None:
    """With other options, and all that is registered with the guard."""
    guard, app, runs = SocketIOGuard(), Flask("app"), []
    app.add_url_rule("/", view_func=lambda: "page")
    guard.on("ordered", ordered=True)(lambda number: number + 1)
    guard.task(lambda: runs.append(1), name="once")
    socketio.init_app(app)
    guard.init_app(app, socketio, max_connections=7)
    assert_protected(app)
    before = socketio.server

    socketio.init_app(app, ping_interval=7, client_manager=BusManager(bus))
    assert isinstance(socketio.server, GuardedServer)
    assert socketio.server is not before
    assert socketio.server.eio.ping_interval == 7
    assert socketio.server.guard.config.max_connections == 7
    assert_protected(app)
    assert ask(app, "ordered", 1) == [2]
    assert len(runs) == 2
    guard.emit("news")
    bus.send({"method": "wake up"})  # whoever listens looks only then whether it shall stop
    wait_until(lambda: sum("news" in str(data) for data in bus.published) == 1)

    socketio.init_app(app)  # the same manager once more
    assert_protected(app)
    with pytest.raises(ConfigError, match="already has a SocketIOGuard"):
        guard.init_app(app, socketio)
    guard.stop(1)
    bus.send({"method": "wake up"})


def test_a_write_only_socketio_that_is_initialised_anew_stays_guarded(bus: Bus) -> None:
    socketio = SocketIO(client_manager=BusManager(bus), message_queue=None)
    guard = SocketIOGuard(socketio=socketio)
    socketio.init_app(None, client_manager=BusManager(bus))
    assert isinstance(socketio.server, GuardedServer)
    guard.emit("news")
    assert len(bus.published) == 1


def test_an_application_that_was_not_guarded_is_when_it_is_served(
    socketio: SocketIO, caplog: pytest.LogCaptureFixture
) -> None:
    """A test of it is not; a guard that comes in time is the one."""
    guard = SocketIOGuard()
    apps = [Flask(name) for name in ("first", "second", "third")]
    for app in apps:
        app.add_url_rule("/", view_func=lambda: "page")
    first, second, third = apps
    socketio.init_app(first)
    guard.init_app(first, socketio)
    socketio.init_app(second)
    assert second.test_client().get("/readyz").status_code == 404
    assert not isinstance(socketio.server, GuardedServer)
    assert caplog.records == []
    http = second.test_client()
    assert http.get("/readyz", environ_overrides=SERVED).status_code == 200
    assert http.get("/", environ_overrides=SERVED).text == "page"
    assert_protected(second)
    (said,) = [record for record in caplog.records if "call guard.init_app" in record.message]
    assert "'second'" in said.message

    caplog.clear()
    socketio.init_app(third)
    guard.init_app(third, socketio, max_connections=7)
    http = third.test_client()
    assert http.get("/", environ_overrides=SERVED).text == "page"
    assert_protected(third)
    assert socketio.server.guard.config.max_connections == 7
    assert not [record for record in caplog.records if "call guard.init_app" in record.message]


def test_what_cannot_be_guarded_anew_is_refused_and_left_as_it_is(socketio: SocketIO) -> None:
    app = Flask("app")
    socketio.init_app(app)
    guard = SocketIOGuard(app, socketio)

    class Late(Namespace):
        async def on_news(self) -> None:
            """Would never run."""

    socketio.namespace_handlers.append(Late("/late"))
    with pytest.raises(ConfigError, match=r"Late\.on_news"):
        socketio.init_app(app)
    assert not isinstance(socketio.server, GuardedServer)
    assert app.test_client().get("/readyz").status_code == 404
    socketio.namespace_handlers.clear()
    socketio.init_app(app)
    guard.init_app(app, socketio)
    assert_protected(app)


def wrong_store(app: Flask, guard: SocketIOGuard) -> dict[str, Any]:
    del app, guard
    return {"delivery_store": lambda: 5}


def wrong_rate(app: Flask, guard: SocketIOGuard) -> dict[str, Any]:
    del app
    guard.on("rated", rate="often")(lambda: None)
    return {}


def hidden_route(app: Flask, guard: SocketIOGuard) -> dict[str, Any]:
    del guard
    app.add_url_rule("/own", "own", lambda: "own")
    return {"readyz_path": "/own"}


def too_late(app: Flask, guard: SocketIOGuard) -> dict[str, Any]:
    """Flask takes no blueprint any more."""
    del guard
    app.test_client().get("/")
    return {}


@pytest.mark.parametrize("wrong", [wrong_store, wrong_rate, hidden_route, too_late])
def test_an_application_that_could_not_be_guarded_is_as_it_was(
    wrong: Callable[[Flask, SocketIOGuard], dict[str, Any]],
) -> None:
    """Stock; and it can be guarded yet, with settings that are right."""
    app, guard = Flask("app"), SocketIOGuard()
    socketio = SocketIO(app, async_mode="threading")
    socketio.on_event("echo", lambda value: value)
    app.add_url_rule("/", view_func=lambda: "page")
    options = wrong(app, guard)
    owners = (socketio, socketio.server, socketio.server.eio, socketio.server.manager)
    before = [(type(each), vars(each).copy(), str(vars(each))) for each in owners]
    wsgi_app, extensions, blueprints = app.wsgi_app, {**app.extensions}, {**app.blueprints}
    with pytest.raises((ConfigError, AssertionError)):
        guard.init_app(app, socketio, **options)
    assert [(type(each), vars(each), str(vars(each))) for each in owners] == before
    assert app.wsgi_app is wsgi_app
    assert (app.extensions, app.blueprints) == (extensions, blueprints)
    assert ask(app, "echo", 1) == [1]
    again = SocketIOGuard()
    again.init_app(app, socketio, scripts_path=None)
    assert ask(app, "echo", 1) == [1]
    assert app.test_client().get("/readyz").status_code == 200
    gc.collect()
