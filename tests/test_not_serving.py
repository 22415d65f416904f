"""Processes that load the application and serve nobody: tests, commands, shells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import requests
from flask import Flask
from flask_socketio import SocketIO

from flask_socketio_guard import ListenerState, SocketIOGuard
from tests.support import free_port, unit_support, wait_until
from tests.support.processes import end_process, start_process
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import RedisServer

nothing_left_behind = unit_support.nothing_left_behind

# An application as its unit tests load it: nothing is patched, and its Redis is not there.
UNIT_TEST = """
import atexit, json, os, sys, threading, time
facts = {}
def report():  # registered first, and so called last
    facts["exit"] = time.monotonic() - facts["ended_at"]
    print(json.dumps(facts))
atexit.register(report)
from flask import Flask
from flask_socketio import SocketIO
app = Flask("app")
socketio = SocketIO(app, async_mode=os.environ["MODE"], message_queue=os.environ["REDIS_URL"])
if os.environ["GUARD"] == "1":
    from flask_socketio_guard import SocketIOGuard
    guard = SocketIOGuard(app, socketio)
@app.get("/")
def index():
    socketio.emit("news", 1)
    return "ok"
client = app.test_client()
began_at = time.monotonic()
facts["statuses"] = [client.get("/").status_code for _ in range(3)]
with app.app_context():
    socketio.emit("from a command", 2)
facts["requests"] = time.monotonic() - began_at
if os.environ["GUARD"] == "1":
    facts["listener"] = str(guard.listener_state)
facts["ended_at"] = time.monotonic()
if os.environ.get("END") == "abrupt":
    thread = threading.Thread(target=lambda: socketio.emit("from a thread", 3))
    thread.start()
    thread.join()
    report()
    sys.stdout.flush()
    os._exit(0)
"""

SERVER = """
import os
from flask import Flask
from flask_socketio import SocketIO
from flask_socketio_guard import SocketIOGuard
app = Flask("app")
socketio = SocketIO(app, async_mode="gevent", message_queue=os.environ["REDIS_URL"])
guard = SocketIOGuard(app, socketio)
@app.get("/")
def index():
    return "ok"
socketio.run(app, host="127.0.0.1", port=int(os.environ["PORT"]))
"""


def environment(**env: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), **env}


def unit_test(*, url: str, mode: str, guard: str, end: str = "") -> dict[str, Any]:
    """Run the unit test of an application and return what it saw."""
    answer = subprocess.run(
        [sys.executable, "-c", UNIT_TEST],
        env=environment(REDIS_URL=url, MODE=mode, GUARD=guard, END=end),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    facts: dict[str, Any] = json.loads(answer.stdout)
    return facts


@pytest.mark.parametrize("mode", ["gevent", "threading"])
def test_a_unit_test_passes_and_ends_at_once_where_there_is_no_redis(mode: str) -> None:
    """As without the guard, which is run beside it."""
    url = f"redis://127.0.0.1:{free_port()}/0"
    stock, guarded = (unit_test(url=url, mode=mode, guard=guard) for guard in ("0", "1"))
    assert guarded["statuses"] == stock["statuses"] == [200, 200, 200]
    assert guarded["listener"] == "idle"
    # Not the time for which the outbox of a process that serves is flushed, which is 5 s.
    assert guarded["requests"] < stock["requests"] + 2.0
    assert guarded["exit"] < stock["exit"] + 2.0


def test_a_command_emits_where_nothing_is_patched(redis_server: RedisServer) -> None:
    """From each of its threads, of which none runs an event loop, and to its abrupt end."""
    with redis_server.client() as client:
        pubsub = client.pubsub(ignore_subscribe_messages=True)
        pubsub.subscribe("flask-socketio")
        wait_until(lambda: redis_server.subscribers() == 1)
        facts = unit_test(url=redis_server.url, mode="gevent", guard="1", end="abrupt")
        events: list[str] = []

        def have_come() -> bool:
            message = pubsub.get_message(timeout=0.1)
            if message:
                events.append(json.loads(message["data"])["event"])
            return len(events) == 5

        wait_until(have_come)
        pubsub.close()
    assert events == ["news", "news", "news", "from a command", "from a thread"]
    assert facts["listener"] == "idle"


def test_a_server_where_nothing_is_patched_says_so_to_its_first_client(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """Its other routes are served, as they are without the guard."""
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = start_process(
            [sys.executable, "-c", SERVER],
            env=environment(REDIS_URL=redis_server.url, PORT=str(port)),
            stdout=output,
            stderr=output,
        )
    try:

        def is_serving() -> bool:
            try:
                return requests.get(f"{url}/", timeout=2.0).text == "ok"
            except requests.ConnectionError:
                return False

        wait_until(is_serving, timeout=20, message="the server does not serve")
        assert requests.get(f"{url}/readyz", timeout=2.0).status_code == 503
        answer = requests.get(f"{url}/socket.io/?EIO=4&transport=polling", timeout=5.0)
        assert answer.status_code == 500
        assert requests.get(f"{url}/", timeout=2.0).text == "ok"
    finally:
        end_process(process)
    assert "gevent.monkey.patch_all()" in log.read_text()
    assert redis_server.subscribers() == 0


@pytest.mark.parametrize(
    ("path", "environ", "is_started"),
    [
        ("/", {}, False),
        ("/", {"SERVER_SOFTWARE": "gunicorn/27.0.1"}, True),
        ("/", {"uwsgi.version": b"2.0.28"}, True),
        ("/readyz", {}, True),
        ("/socket.io/?EIO=4&transport=polling", {}, True),
    ],
    ids=["test-client", "server", "uwsgi", "health", "client"],
)
def test_with_a_queue_only_who_serves_starts_the_guard(
    nothing_left_behind: None,
    redis_server: RedisServer,
    path: str,
    environ: dict[str, Any],
    is_started: bool,
) -> None:
    """Whoever asks for health wants to know of a process that serves."""
    app = Flask("app")
    socketio = SocketIO(app, async_mode="threading", message_queue=redis_server.url)
    guard = SocketIOGuard(app, socketio)
    app.test_client().get(path, environ_overrides=environ)
    names = [thread.name for thread in threading.enumerate()]
    assert ("socketio-guard:listener" in names) is is_started
    assert (guard.listener_state is not ListenerState.IDLE) is is_started
    guard.stop(2.0)
