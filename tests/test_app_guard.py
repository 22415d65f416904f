"""What runs for one application: its start, its stop, and its way through a fork."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from flask_socketio import SocketIO

from flask_socketio_guard import ListenerState, SocketIOGuard
from flask_socketio_guard.app_guard import all_guards
from tests.support import unit_support, wait_until
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import RedisServer
    from tests.support.unit_support import Bus, Guarded

nothing_left_behind = unit_support.nothing_left_behind
make_guarded = unit_support.make_guarded
make_process = unit_support.make_process
guarded = unit_support.guarded
bus = unit_support.bus


def own_threads() -> list[str]:
    return sorted(
        thread.name for thread in threading.enumerate() if thread.name.startswith("socketio-guard:")
    )


def run(program: str, **env: str) -> str:
    """Run a program in a process of its own and return what it prints."""
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


# Start


def test_nothing_runs_before_the_first_request(guarded: Guarded) -> None:
    assert own_threads() == []
    assert guarded.app.test_client().get("/livez").status_code == 200
    assert own_threads() == [
        "socketio-guard:callbacks",
        "socketio-guard:deadlines",
        "socketio-guard:tick",
    ]


def test_any_request_starts_the_guard(guarded: Guarded) -> None:
    guarded.app.test_client().get("/no-such-page")
    assert own_threads() != []
    assert guarded.app.test_client().get("/readyz").status_code == 200


def test_with_a_queue_the_listener_starts_without_any_client(
    make_process: Callable[..., Guarded],
) -> None:
    """Stock waits for the first client, and nobody can tell."""
    process = make_process()
    assert own_threads() == [
        "socketio-guard:callbacks",
        "socketio-guard:deadlines",
        "socketio-guard:listener",
        "socketio-guard:outbox",
        "socketio-guard:probe",
        "socketio-guard:tick",
    ]
    answer = process.app.test_client().get("/readyz")
    assert answer.json == {"status": "pass", "listener": "running"}


def test_many_who_start_at_once_start_it_once(guarded: Guarded) -> None:
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        guarded.inner.start()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(own_threads()) == 3
    assert guarded.guard.counters["task_failures"] == 0


def test_a_process_is_not_ready_before_its_listener_runs(
    make_guarded: Callable[..., Guarded], bus: Bus
) -> None:
    guarded = make_guarded(
        options={"client_manager": unit_support.BusManager(bus)}, broker_down="fail"
    )
    bus.is_down = True
    inner = guarded.inner
    inner.start()
    http = guarded.app.test_client()
    answer = http.get("/readyz")
    assert answer.status_code == 503
    # The reader, in a task of its own, may have found out already.
    assert answer.get_json(force=True)["listener"] in {"starting", "reconnecting"}
    assert http.get("/livez").status_code == 200
    bus.is_down = False
    wait_until(lambda: inner.listener_state() is ListenerState.RUNNING)
    stopping = threading.Thread(target=inner.stop, args=[5.0])
    stopping.start()
    while stopping.is_alive():
        bus.send({"method": "wake up"})
        stopping.join(0.01)


def test_the_answer_changes_with_the_state_and_not_with_the_tick(
    make_process: Callable[..., Guarded], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load balancer hears of a lost broker at once."""
    process = make_process()
    http = process.app.test_client()
    assert http.get("/readyz").status_code == 200
    monkeypatch.setattr(process.inner.health, "tick", lambda: None)
    bus.is_down = True
    wait_until(lambda: http.get("/readyz").get_json(force=True)["status"] == "warn", timeout=2.5)


# Middleware


def test_health_is_served_in_front_of_the_application_and_its_middleware(
    guarded: Guarded,
) -> None:
    """Middleware that was there before the guard is behind it, what comes later in front."""
    calls: list[str] = []
    inside = guarded.app.wsgi_app

    def later(environ: Any, start_response: Any) -> Any:
        calls.append(environ["PATH_INFO"])
        return inside(environ, start_response)

    guarded.app.wsgi_app = later  # type: ignore[method-assign]
    assert guarded.app.test_client().get("/healthz").status_code == 200
    assert calls == ["/healthz"]


def test_a_path_of_its_own_for_socketio_is_bounded_too(
    make_guarded: Callable[..., Guarded],
) -> None:
    guarded = make_guarded(max_connections=1, options={"path": "/ws/sockets"})
    http = guarded.app.test_client()
    statuses = [http.get("/ws/sockets/?EIO=4&transport=polling").status_code for _ in range(2)]
    assert statuses == [200, 503]
    assert http.get("/socket.io/?EIO=4&transport=polling").status_code == 404


# Stop


def test_what_a_task_says_last_still_gets_out(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    """Tasks end first, then the outbox empties, then the listener stops."""
    process = make_process()

    def work() -> None:
        process.guard.sleep(60.0)
        process.guard.emit("good-bye")

    process.guard.start_background_task(work)
    time.sleep(0.02)
    stop_with_bus(process, bus)
    assert [data["event"] for data in bus.published if data["method"] == "emit"] == ["good-bye"]
    assert process.guard.listener_state is ListenerState.STOPPED
    assert process.guard.counters["outbox_dropped"] == 0


def stop_with_bus(process: Guarded, bus: Bus, timeout: float = 5.0) -> None:
    """Stop a process; its listener looks at its next message whether it shall."""
    stopping = threading.Thread(target=process.inner.stop, args=[timeout])
    stopping.start()
    while stopping.is_alive():
        bus.send({"method": "wake up"})
        stopping.join(0.01)


def test_a_process_that_has_stopped_is_not_ready(guarded: Guarded) -> None:
    http = guarded.app.test_client()
    assert http.get("/readyz").status_code == 200
    guarded.guard.stop(2.0)
    assert [http.get(path).status_code for path in ("/livez", "/readyz")] == [200, 503]
    assert own_threads() == []


def test_a_process_that_stops_is_not_ready_while_it_does(guarded: Guarded) -> None:
    """Load balancers should turn away before the tasks have ended."""
    http = guarded.app.test_client()
    http.get("/readyz")
    seen: list[int] = []

    def work() -> None:
        guarded.guard.sleep(60.0)
        seen.append(http.get("/readyz").status_code)

    guarded.guard.start_background_task(work)
    time.sleep(0.02)
    guarded.guard.stop(2.0)
    assert seen == [503]


def test_a_stop_that_comes_twice_or_too_early_does_no_harm(guarded: Guarded) -> None:
    guarded.guard.stop(1.0)
    guarded.guard.stop(1.0)
    guarded.guard.start()
    guarded.guard.stop(1.0)


def test_tasks_that_do_not_end_in_time_are_named(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    guarded.guard.start()
    guarded.guard.start_background_task(release.wait, 10.0, name="deaf")
    began_at = time.monotonic()
    with caplog.at_level(logging.WARNING, "flask_socketio_guard"):
        guarded.guard.stop(0.1)
    assert time.monotonic() - began_at < 3.0
    assert "tasks did not end in time: deaf" in [record.getMessage() for record in caplog.records]
    release.set()


def test_the_stop_timeout_of_the_settings_is_the_default(
    make_guarded: Callable[..., Guarded],
) -> None:
    guarded = make_guarded(stop_timeout=0.05)
    release = threading.Event()
    guarded.guard.start()
    guarded.guard.start_background_task(release.wait, 10.0)
    began_at = time.monotonic()
    guarded.guard.stop()
    assert time.monotonic() - began_at < 2.0
    release.set()


def test_a_stop_does_not_wait_longer_for_the_broker_than_it_may(
    make_process: Callable[..., Guarded], bus: Bus
) -> None:
    process = make_process(exit_flush_timeout=0.2)
    bus.is_down = True
    for number in range(3):
        process.guard.emit("news", number)
    began_at = time.monotonic()
    stop_with_bus(process, bus, timeout=5.0)
    assert time.monotonic() - began_at < 4.0
    assert process.guard.counters["outbox_dropped"] == 3


@pytest.mark.parametrize("way", ["drain", "stop", "exit"])
def test_no_end_waits_for_a_right_to_publish(
    make_process: Callable[..., Guarded], bus: Bus, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Stock does not either; what is left is counted."""
    process = make_process()
    inner = process.inner
    assert inner.queue is not None
    inner.queue.outbox.trouble = "permission"
    monkeypatch.setattr(inner.queue.outbox, "flush", pytest.fail)
    monkeypatch.setattr(inner.queue.outbox, "_next_batch", list)
    inner.queue.outbox.put(b"kept")
    if way == "exit":
        inner.flush_at_exit()
    elif way == "drain":
        assert not inner.drain(0.5)
    if way != "exit":
        stop_with_bus(process, bus, timeout=0.5)
    assert inner.counters.as_dict()["outbox_dropped"] == 1


# The end of the process, and forks

WRITE_ONLY = """
import os
from flask_socketio import SocketIO
from flask_socketio_guard import SocketIOGuard
socketio = SocketIO(message_queue=os.environ["REDIS_URL"])
guard = SocketIOGuard(socketio=socketio)
for number in range(50):
    guard.emit("news", number)
"""


def test_a_script_that_ends_has_sent_what_it_emitted(redis_server: RedisServer) -> None:
    """No flush, no stop: it just ends, as scripts do."""
    with redis_server.client() as client:
        pubsub = client.pubsub(ignore_subscribe_messages=True)
        pubsub.subscribe("flask-socketio")
        wait_until(lambda: redis_server.subscribers() == 1)
        run(WRITE_ONLY, REDIS_URL=redis_server.url)
        arrived = 0
        deadline = time.monotonic() + 5.0
        while arrived < 50 and time.monotonic() < deadline:
            if pubsub.get_message(timeout=0.2):
                arrived += 1
        pubsub.close()
    assert arrived == 50


def test_a_script_without_its_broker_ends_all_the_same() -> None:
    """After the time that it was given, and the loss is logged."""
    env = {"SOCKETIO_GUARD_EXIT_FLUSH_TIMEOUT": "0.3", "REDIS_URL": "redis://127.0.0.1:1/0"}
    run(WRITE_ONLY, **env)


FORKING = """
import os
from flask import Flask
from flask_socketio import SocketIO
from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.app_guard import all_guards
app = Flask("app")
socketio = SocketIO(app, async_mode="threading", message_queue=os.environ["REDIS_URL"])
guard = SocketIOGuard(app, socketio)
guard.task(name="steady")(lambda: guard.sleep(60))
if os.environ["STARTED"] == "1":
    guard.start()
    guard.emit("before")
    assert guard.flush(5)
(inner,) = all_guards()
before = socketio.server.manager.host_id
runtime, outbox = inner.runtime, inner.queue.outbox
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    facts = [
        socketio.server.manager.host_id != before,
        inner.queue.outbox is not outbox,
        str(guard.listener_state),
        [task.name for task in inner.supervisor.tasks],
    ]
    guard.start()
    import time
    deadline = time.monotonic() + 5
    while str(guard.listener_state) != "running" and time.monotonic() < deadline:
        time.sleep(0.01)
    facts += [str(guard.listener_state), len(inner.supervisor.tasks)]
    guard.emit("from the child")
    facts.append(guard.flush(5))
    guard.stop(2)
    os.write(writer, repr(facts).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(reader, 10000).decode())
print(socketio.server.manager.host_id == before, inner.queue.outbox is outbox)
guard.stop(2)
"""


@pytest.mark.parametrize("started", ["0", "1"], ids=["preloaded", "running"])
def test_a_forked_child_starts_afresh_with_an_identity_of_its_own(
    redis_server: RedisServer, started: str
) -> None:
    """Else parent and child would take each other's messages for their own."""
    child, parent = run(FORKING, REDIS_URL=redis_server.url, STARTED=started).splitlines()
    assert child == repr([True, True, "idle", [], "running", 7, True])
    assert parent == "True True"


RUNNING = """
import os, subprocess
import gevent.subprocess
from flask import Flask
from flask_socketio import SocketIO
from flask_socketio_guard import SocketIOGuard
from flask_socketio_guard.app_guard import all_guards
app = Flask("app")
guard = SocketIOGuard(app, SocketIO(app, async_mode="threading"))
(inner,) = all_guards()
before = inner.supervisor
reader, writer = os.pipe()
def look():
    os.write(writer, b"kept " if inner.supervisor is before else b"renewed ")
for module in (subprocess, gevent.subprocess):
    module.run(["true"], preexec_fn=look, check=True)
child = os.fork()
if child == 0:
    look()
    os._exit(0)
os.waitpid(child, 0)
print(os.read(reader, 100).decode())
"""


def test_a_child_that_is_about_to_run_a_program_does_not_begin_anew() -> None:
    """All that it has is given up at once, and its parent waits for that."""
    assert run(RUNNING).split() == ["kept", "kept", "renewed"]


# Several guards in one process


def test_all_guards_of_the_process_are_known_as_long_as_they_live(
    nothing_left_behind: None,
) -> None:
    import gc

    app = Flask("known")
    guard = SocketIOGuard(app, SocketIO(app, async_mode="threading"))
    assert app in [each.app for each in all_guards()]
    del app, guard
    gc.collect()
    assert "known" not in [each.app.name for each in all_guards() if each.app is not None]
