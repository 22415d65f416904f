"""What gunicorn has to say, by hand and from a real gunicorn."""

from __future__ import annotations

import os
import signal
import threading
from importlib.metadata import requires
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import pytest
from flask import Flask, Response
from flask_socketio import SocketIO
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from flask_socketio_guard import SocketIOGuard, app_guard
from flask_socketio_guard import gunicorn as hooks
from flask_socketio_guard.core import lifecycle, process
from flask_socketio_guard.errors import ConfigError
from flask_socketio_guard.gunicorn import loading_worker
from flask_socketio_guard.upstream.socketio.server import GuardedServer
from tests.support import GunicornServer, unit_support, wait_until
from tests.support.raw_clients import PollingClient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.unit_support import Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
guarded = unit_support.guarded


@pytest.fixture(autouse=True)
def of_this_test_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks act on every guard of the process: leave out those of other tests."""
    monkeypatch.setattr(process, "_members", WeakSet())
    monkeypatch.setattr(hooks, "_booted", None)


HOOKS = "from flask_socketio_guard.gunicorn import post_worker_init, worker_exit\n"


def own_threads() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith("socketio-guard:")
    ]


def test_the_hooks_start_and_stop_every_guard_of_the_worker(
    make_guarded: Callable[..., Guarded],
) -> None:
    made = [make_guarded(), make_guarded()]
    hooks.post_worker_init(SimpleNamespace(pid=os.getpid()))
    assert len(own_threads()) == 6
    for guarded in made:
        assert guarded.app.test_client().get("/readyz").status_code == 200
    # gunicorn calls it in the master as well, for a worker that was gone before.
    hooks.worker_exit(object(), SimpleNamespace(pid=os.getpid() + 1))
    assert len(own_threads()) == 6
    hooks.worker_exit(object(), SimpleNamespace(pid=os.getpid()))
    assert own_threads() == []
    for guarded in made:
        assert guarded.app.test_client().get("/readyz").status_code == 503


def test_a_worker_that_is_told_to_stop_ends_its_tasks_and_goes_on_serving(
    make_guarded: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gunicorn leaves it its clients for a while; load balancers should look elsewhere."""
    guarded = make_guarded(stop_timeout=2.0)  # the client stays until it is cut off
    monkeypatch.setattr(lifecycle, "TICK_INTERVAL", 0.05)
    slept: list[bool] = []
    guarded.guard.task(lambda: slept.append(guarded.guard.sleep(60.0)), name="steady")
    guarded.socketio.on_event("echo", lambda value: value)
    worker = SimpleNamespace(pid=os.getpid(), alive=True)
    hooks.post_worker_init(worker)
    http = guarded.app.test_client()
    client = guarded.client()
    wait_until(lambda: len(own_threads()) == 3)
    assert http.get("/readyz").status_code == 200
    worker.alive = False
    wait_until(lambda: slept == [False], message="the task was not told")
    wait_until(lambda: http.get("/readyz").status_code == 503)
    assert http.get("/livez").status_code == 200
    assert client.emit("echo", 1, callback=True) == 1
    hooks.worker_exit(object(), worker)
    wait_until(lambda: own_threads() == [])


GRACEFUL_TIMEOUT = 30


class Settings(SimpleNamespace):
    """gunicorn's configuration, as far as the hooks look at it."""

    def set(self, name: str, value: Any) -> None:
        setattr(self, name, value)


class Worker:
    """A worker that has loaded its application."""

    def __init__(self, wsgi: Any) -> None:
        self.pid, self.age, self.alive, self.wsgi = os.getpid(), 1, True, wsgi
        self.sockets: list[object] = []
        self.cfg = Settings(
            workers=1,
            graceful_timeout=GRACEFUL_TIMEOUT,
            post_worker_init=lambda worker: None,
            worker_exit=lambda server, worker: None,
        )


@pytest.mark.parametrize("path", ["/page", "/beside/page"])
def test_a_stop_waits_for_answers_that_are_being_sent(
    make_guarded: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Those of an application that is mounted beside, too: nothing cuts a download short."""
    guarded, beside = make_guarded(), Flask("beside")
    for app in (guarded.app, beside):
        app.add_url_rule("/page", view_func=lambda: Response(iter(["some", "more"])))
    polls: list[float] = []
    sleep = guarded.inner.runtime.sleep

    def note(seconds: float) -> None:
        polls.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(hooks, "_POLL_INTERVAL", 0.001)
    monkeypatch.setattr(guarded.inner.runtime, "sleep", note)
    worker = Worker(DispatcherMiddleware(guarded.app, {"/beside": beside}))
    hooks.post_worker_init(worker)
    download = Client(worker.wsgi).get(path)
    assert next(download.iter_encoded()) == b"some"
    worker.alive = False
    wait_until(lambda: guarded.inner.lifecycle.is_drained)
    wait_until(lambda: polls.count(0.001) >= 3, message="nobody waits for the answer")
    assert worker.cfg.graceful_timeout == GRACEFUL_TIMEOUT
    download.close()
    wait_until(lambda: worker.cfg.graceful_timeout < GRACEFUL_TIMEOUT)
    hooks.worker_exit(object(), worker)


def test_an_application_that_is_made_with_the_first_request_is_drained(
    make_guarded: Callable[..., Guarded],
) -> None:
    """By hooks that were called when there was no guard yet."""
    worker = Worker(lambda *_: [])
    hooks.post_worker_init(worker)
    guarded = make_guarded()
    http = guarded.app.test_client()
    assert guarded.inner.lifecycle.has_served
    assert http.get("/readyz").status_code == 200
    worker.alive = False
    wait_until(lambda: guarded.inner.lifecycle.is_drained, message="nobody drains it")
    assert http.get("/readyz").status_code == 503
    wait_until(lambda: worker.cfg.graceful_timeout < GRACEFUL_TIMEOUT)
    worker.cfg.worker_exit(object(), worker)
    assert own_threads() == []


def test_an_application_that_cannot_start_in_its_worker_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker(lambda *_: [])
    hooks.post_worker_init(worker)
    app = Flask("late")
    socketio = SocketIO(app, async_mode="threading")
    served = app.wsgi_app
    with monkeypatch.context() as patched:

        def fail(guard: app_guard.AppGuard) -> None:
            raise ConfigError("boom")

        patched.setattr(app_guard.AppGuard, "check_paths", fail)
        with pytest.raises(ConfigError, match="boom"):
            SocketIOGuard(app, socketio)
    assert app.wsgi_app == served
    assert "socketio_guard" not in app.extensions
    assert not isinstance(socketio.server, GuardedServer)
    assert app_guard.all_guards() == []
    SocketIOGuard(app, socketio)
    assert app.test_client().get("/readyz").status_code == 200
    hooks.worker_exit(object(), worker)
    assert own_threads() == []


def test_nothing_starts_by_itself_outside_of_a_worker(guarded: Guarded) -> None:
    """A shell, a migration, a preloading master: each loads the application."""
    assert loading_worker() is None
    assert own_threads() == []


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., GunicornServer]:
    """Return a function that makes a gunicorn whose application notes its start and its stop."""

    def make(
        async_mode: str,
        *,
        has_hooks: bool,
        arguments: tuple[str, ...] = (),
        app: str = "tests.support.unit_app",
    ) -> GunicornServer:
        if has_hooks:
            (tmp_path / "hooks.py").write_text(HOOKS)
            arguments = (*arguments, "--config", str(tmp_path / "hooks.py"))
        return GunicornServer(
            f"{app}:create_app()",
            async_mode=async_mode,
            env={"ASYNC_MODE": async_mode, "LIFE_FILE": str(tmp_path / "life")},
            arguments=arguments,
        )

    return make


def life(tmp_path: Path) -> list[tuple[int, str]]:
    """Return what the processes noted: their id, and what happened."""
    path = tmp_path / "life"
    if not path.exists():
        return []
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(int(pid), what) for pid, what in lines]


@pytest.mark.parametrize("async_mode", ["gevent", "threading"])
@pytest.mark.parametrize("has_hooks", [True, False], ids=["hooks", "no-hooks"])
def test_a_worker_starts_its_tasks_before_any_request_and_stops_them(
    launch: Callable[..., GunicornServer], tmp_path: Path, async_mode: str, has_hooks: bool
) -> None:
    """The line alone is enough; hooks beside it change nothing."""
    server = launch(async_mode, has_hooks=has_hooks)
    try:
        server.launch()
        wait_until(lambda: life(tmp_path), timeout=20, message=f"no start:\n{server.log()}")
        (worker,) = server.worker_pids()
        assert life(tmp_path) == [(worker, "started")]
        server.ask_to_stop()
        wait_until(lambda: not server.is_alive(), timeout=10)
        assert life(tmp_path) == [(worker, "started"), (worker, "stopped")]
        assert "Traceback" not in server.log()
    finally:
        server.close()


@pytest.mark.parametrize("async_mode", ["gevent", "threading"])
def test_a_preloading_master_starts_nothing_and_each_worker_does(
    launch: Callable[..., GunicornServer], tmp_path: Path, async_mode: str
) -> None:
    server = launch(async_mode, has_hooks=False, arguments=("--preload", "--workers", "2"))
    try:
        server.launch()
        wait_until(lambda: len(life(tmp_path)) >= 2, timeout=20, message=server.log())
        assert sorted(life(tmp_path)) == sorted((pid, "started") for pid in server.worker_pids())
        assert server.pid not in dict(life(tmp_path))
    finally:
        server.close()


PUBLISHING = """
import multiprocessing, os
from flask import Flask
from flask_socketio import SocketIO
from flask_socketio_guard import SocketIOGuard
guard = SocketIOGuard(socketio=SocketIO(message_queue="redis://127.0.0.1:1/0"))
def work():
    os._exit(7)
def create_app():
    app = Flask(__name__)
    @app.get("/livez")
    def fork():
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
        return str(child.exitcode)
    return app
"""


def test_any_worker_serves_an_application_that_only_emits(
    launch: Callable[..., GunicornServer], tmp_path: Path
) -> None:
    """It has no clients, whatever mode Flask-SocketIO picks; its children are no workers."""
    (tmp_path / "publishing.py").write_text(PUBLISHING)
    arguments = ("--worker-class", "sync", "--threads", "1", "--pythonpath", str(tmp_path))
    server = launch("threading", has_hooks=True, arguments=arguments, app="publishing")
    try:
        server.start(path="/livez")
        assert server.get("/livez").text == "7"
    finally:
        server.close()


def test_a_sync_worker_serves_threading_mode(launch: Callable[..., GunicornServer]) -> None:
    """One request at a time, as without the guard."""
    server = launch(
        "threading", has_hooks=True, arguments=("--worker-class", "sync", "--threads", "1")
    )
    try:
        server.start(path="/livez")
        assert server.get("/readyz").status_code == 200
        assert "serves one request at a time" in server.log()
    finally:
        server.close()


def test_a_worker_that_died_is_replaced_by_one_that_starts(
    launch: Callable[..., GunicornServer], tmp_path: Path
) -> None:
    server = launch("gevent", has_hooks=True)
    try:
        server.launch()
        wait_until(lambda: life(tmp_path), timeout=20, message=server.log())
        (first,) = server.worker_pids()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(life(tmp_path)) == 2, timeout=20, message=server.log())
        assert [pid == first for pid, _ in life(tmp_path)] == [True, False]
        server.wait_until_serving()
        assert server.get("/readyz").status_code == 200
    finally:
        server.close()


WITHOUT_GEVENT = """
import sys
sys.modules.update({"gevent": None, "geventwebsocket": None, "greenlet": None})
"""


def test_threads_are_served_where_gevent_is_not_installed(
    launch: Callable[..., GunicornServer], tmp_path: Path
) -> None:
    """A real client is answered; nothing that is always there asks for gevent."""
    (tmp_path / "without.py").write_text(WITHOUT_GEVENT)
    server = launch(
        "threading", has_hooks=False, arguments=("--config", str(tmp_path / "without.py"))
    )
    try:
        server.start()
        client = PollingClient(server.port).open().join()
        assert client.post('420["quick"]').status == 200
        assert '430["in time"]' in client.get().packets
        assert server.get("/readyz").status_code == 200
        assert "Traceback" not in server.log()
    finally:
        server.close()


def test_gevent_does_not_come_unasked() -> None:
    """Flask-SocketIO takes its mode as soon as it can be imported."""
    required = [line.lower() for line in requires("Flask-SocketIO-Guard") or []]
    gevents = [line for line in required if line.startswith(("gevent", "greenlet"))]
    assert len(gevents) == 2
    assert all('extra == "gunicorn"' in line for line in gevents)


def test_a_worker_spares_its_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules stay, and need not be looked at time and again while clients wait; once is enough."""
    calls: list[str] = []
    collector = SimpleNamespace(
        collect=lambda: calls.append("collect"), freeze=lambda: calls.append("freeze")
    )
    monkeypatch.setattr(hooks, "gc", collector)
    worker = SimpleNamespace(pid=os.getpid(), alive=True, wsgi=lambda *args: [])
    hooks.post_worker_init(worker)
    hooks.post_worker_init(worker)
    assert calls == ["collect", "freeze"]
