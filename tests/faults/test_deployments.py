"""Deployments as people have them, with nothing of the guard but its one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from websockets.sync.client import unix_connect

from tests.faults import connection_app
from tests.faults.connection_app import HIDE
from tests.faults.connections import CONNECTION_APP, WORKERS, happenings
from tests.support import GunicornServer, RedisServer, UwsgiServer, wait_until
from tests.support.javascript import CLIENT_MODULE, require_client
from tests.support.raw_clients import PollingClient, ask
from tests.support.raw_websocket import target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.raw_clients import RawClients

    Measured = Callable[[str, object], None]
    Launch = Callable[..., GunicornServer]

pytestmark = pytest.mark.timeout(90)

SERVICE_RESTART = 1012
_GRACEFUL_TIMEOUT = 20
_SOON = 10.0
_REFUSED_CLIENT = Path(__file__).with_name("refused_client.mjs")
_UNFIT = {
    "gthread": ("--worker-class", "gthread", "--threads", "100"),
    "gthread-preload": ("--worker-class", "gthread", "--threads", "100", "--preload"),
    "sync": ("--worker-class", "sync"),
}
_FILES = 128


@pytest.fixture
def launch(is_stock: bool) -> Iterator[Launch]:
    """Return a function that starts a gunicorn without any hooks."""
    servers: list[GunicornServer] = []

    def make(
        *arguments: str,
        async_mode: str = "gevent",
        workers: int = 1,
        is_awaited: bool = True,
        **config: Any,
    ) -> GunicornServer:
        if is_stock and "gevent" in arguments:
            config[HIDE] = True  # see worker_options()
        env = {
            "GUARD": "0" if is_stock else "1",
            "ASYNC_MODE": async_mode,
            "APP_CONFIG": json.dumps(config),
        }
        server = GunicornServer(
            CONNECTION_APP, async_mode=async_mode, env=env, workers=workers, arguments=arguments
        )
        servers.append(server)
        server.launch()
        if is_awaited:
            server.wait_until_serving()
        return server

    yield make
    for server in servers:
        server.close()


def errors(server: GunicornServer, *, level: str = "ERROR") -> list[str]:
    return [line.message for line in server.records(matching=lambda each: each.level == level)]


@pytest.mark.parametrize(
    ("worker", "preload"),
    [
        ("gevent-websocket", ("--preload",)),
        ("gthread", ()),
        pytest.param("gevent-websocket", (), marks=pytest.mark.long),
        pytest.param("gevent", (), marks=pytest.mark.long),
    ],
)
@pytest.mark.faults(
    "SIGTERM to a worker without hooks",
    stock="clients are told nothing and cut off after the graceful timeout",
    because="the server runs on",
)
def test_a_worker_without_hooks_drains_its_clients(
    launch: Launch, clients: RawClients, measured: Measured, worker: str, preload: tuple[str, ...]
) -> None:
    """Close code, disconnect handlers and the end come as they do with the hooks."""
    server = launch(
        *("--graceful-timeout", str(_GRACEFUL_TIMEOUT)),
        *WORKERS.get(worker, ()),
        *preload,
        async_mode="threading" if worker == "gthread" else "gevent",
    )
    opened = [clients.websocket(server.port).open().join() for _ in range(3)]
    polling = clients.polling(server.port).open().join()
    told_at = time.monotonic()
    server.ask_to_stop()
    wait_until(lambda: not server.is_alive(), timeout=_SOON, message="the server runs on")
    measured("ended after", time.monotonic() - told_at)
    assert {client.read_farewell().code for client in opened} == {SERVICE_RESTART}
    departed = [seen["sid"] for seen in happenings(server, "departed")]
    assert sorted(departed) == sorted([*(client.sid for client in opened), polling.sid])
    assert "Traceback" not in server.log(), server.log()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", _UNFIT)
@pytest.mark.faults(
    "gevent's mode under a worker that has no event loop",
    stock="the worker serves, and no client is ever answered",
    because="runs on in silence",
)
def test_a_mode_that_does_not_fit_the_worker_ends_it_at_boot(launch: Launch, kind: str) -> None:
    """One line names the mend, and gunicorn does not try again."""
    server = launch(*_UNFIT[kind], is_awaited=False)

    def has_answered() -> bool:
        return not server.is_alive() or "Booting worker" in server.log()

    wait_until(has_answered, timeout=20)
    wait_until(lambda: not server.is_alive(), timeout=_SOON, message="it runs on in silence")
    log = server.log() + "".join(each.message for each in server.records())
    assert 'async_mode="threading"' in log, log
    assert "Worker failed to boot" in server.log()


@pytest.mark.faults(
    "clients that poll, on two workers",
    stock="half the requests are answered 400, and nothing says why",
    because="nothing is said",
)
def test_two_workers_are_reported_at_boot_and_when_a_client_meets_the_wrong_one(
    launch: Launch,
) -> None:
    server = launch(workers=2)
    statuses: set[int] = set()
    deadline = time.monotonic() + 20
    while 400 not in statuses and time.monotonic() < deadline:
        client = PollingClient(server.port).open()
        statuses |= {
            ask(server.port, "POST", target("polling", session=client.session), body=b"40").status
            for _ in range(4)
        }
    assert 400 in statuses, "all requests found the session"
    told = [line for line in errors(server) if "2 workers" in line]
    assert len(told) == 1, "nothing is said at boot"
    assert "sticky" in told[0]
    lines = [line for line in errors(server, level="WARNING") if "sticky" in line]
    assert 1 <= len(lines) <= 2, "one folded line for each worker"


@pytest.mark.faults(
    "a session that no process knows",
    stock="answered 400; one line, without a remedy, in the life of the process",
    because="nothing is counted",
)
def test_unknown_sessions_are_counted_and_those_that_ended_here_are_not(
    launch: Launch, clients: RawClients
) -> None:
    server = launch()
    ended = clients.websocket(server.port).open().join()
    session = clients.polling(server.port).open().join()
    session.post("1")
    ended.close()
    wait_until(lambda: len(happenings(server, "departed")) == 2)
    assert ask(server.port, "GET", target("polling", session=session.session)).status == 400
    assert {
        ask(server.port, "GET", target("polling", session=f"guess{n}")).status for n in range(50)
    } == {400}
    guard = server.state()["guard"]
    assert guard, "nothing is counted"
    assert guard["counters"]["sessions_elsewhere"] == 50
    assert len([line for line in errors(server, level="WARNING") if "sticky" in line]) == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("worker", [*WORKERS, "gthread"])
@pytest.mark.faults(
    "more clients than files may be open",
    stock="accept fails, with a traceback each time",
    because="Traceback",
)
def test_clients_are_refused_before_the_files_run_out(
    launch: Launch, clients: RawClients, tmp_path: Path, measured: Measured, worker: str
) -> None:
    limits = tmp_path / "limits.py"
    limits.write_text(
        f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({_FILES}, {_FILES}))\n"
    )
    server = launch(
        "--config",
        str(limits),
        *WORKERS.get(worker, ("--threads", "200")),
        async_mode="threading" if worker == "gthread" else "gevent",
    )
    idle = [clients.connection(server.port).dial() for _ in range(_FILES + 40)]
    for connection in idle:
        connection.shut()
    opened = 0
    with contextlib.suppress(OSError, AssertionError):
        while opened < _FILES:
            clients.websocket(server.port).open()
            opened += 1
    measured("let in", opened)
    assert "Traceback" not in server.log(), f"Traceback: {server.log()[-3000:]}"
    assert _FILES // 4 < opened < _FILES
    assert ask(server.port, "GET", target("polling")).status == 503
    assert server.get("/readyz").status_code == 200


@pytest.mark.faults(
    "WebSockets over a Unix socket",
    stock="gevent-websocket raises KeyError for each but the last",
    because="KeyError",
)
def test_clients_behind_a_unix_socket_disconnect_without_errors(
    launch: Launch, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    server = launch("--bind", f"unix:{path}", SOCKETIO_GUARD_MAX_CONNECTIONS_PER_ADDRESS=2)
    with ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(unix_connect(str(path), "ws://test" + target("websocket")))
            client.send("40")
            assert client.recv().startswith("0")
            assert client.recv().startswith("40")
    wait_until(lambda: len(happenings(server, "departed")) == 4)
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: not server.is_alive(), timeout=_SOON)
    assert "KeyError" not in server.log(), f"KeyError: {server.log()[-2000:]}"
    if server.records(matching=lambda each: each.logger.startswith("flask_socketio_guard")):
        told = [line for line in errors(server, level="WARNING") if "PER_ADDRESS" in line]
        assert len(told) == 1


def test_a_refused_javascript_client_is_told_at_once(
    launch: Launch, clients: RawClients, measured: Measured
) -> None:
    """After an answer 101 it would wait for the 20 s of its own timeout."""
    require_client()
    server = launch(SOCKETIO_GUARD_MAX_CONNECTIONS=1)
    clients.websocket(server.port).open().join()
    command = ["node", str(_REFUSED_CLIENT), str(CLIENT_MODULE), server.url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=40, check=True)
    seen = json.loads(result.stdout)
    measured("told after, in ms", seen["milliseconds"])
    assert seen["message"] == "websocket error"


@pytest.mark.parametrize(
    "is_routed",
    [
        pytest.param(False, id="http-socket"),
        pytest.param(True, id="http", marks=pytest.mark.long),
    ],
)
def test_uwsgi_serves_as_gunicorn_does(clients: RawClients, *, is_routed: bool) -> None:
    """Both transports and the change between them, a queue, and a drain with its close code.

    No row of the table: whether stock serves WebSockets there is up to uWSGI's build.
    """
    with RedisServer() as redis:
        env = {"GUARD": "1", "ASYNC_MODE": "gevent_uwsgi", "REDIS_URL": redis.url}
        with UwsgiServer(CONNECTION_APP, env=env, is_routed=is_routed) as server:
            polling = clients.polling(server.port).open().join()
            opened = clients.websocket(server.port).open().join()
            upgraded = clients.polling(server.port).open().join()
            change = clients.websocket(server.port).open(session=upgraded.session)
            change.send("2probe")
            assert change.read_until("3probe")
            change.send("5")
            wait_until(lambda: server.get("/readyz").status_code == 200)
            for client in (opened, change):
                client.emit("work", 0.0)
            wait_until(lambda: len(happenings(server, "work done")) == 2)
            gone = clients.websocket(server.port).open().join()
            gone.shut()
            wait_until(lambda: happenings(server, "departed", sids={gone.sid}))
            assert server.get("/file").text == Path(connection_app.__file__).read_text()
            sent = "GET /file => generated "
            wait_until(lambda: sent in server.log(), message="the file was not sent")
            (line,) = [line for line in server.log().splitlines() if sent in line]
            assert "via sendfile()" in line, "the file was sent line by line"
            server.post("/guard/drain")
            assert {each.read_farewell().code for each in (opened, change)} == {SERVICE_RESTART}
            wait_until(lambda: len(happenings(server, "departed")) == 4)
            assert polling.sid in {seen["sid"] for seen in happenings(server, "departed")}
            assert server.get("/readyz").status_code == 503
            assert ask(server.port, "GET", target("polling")).status == 503
            ended = f"transport=websocket&sid={upgraded.session} => "
            wait_until(lambda: ended in server.log(), message="the request did not end")
            for trouble in ("Traceback", "OSError"):
                assert trouble not in server.log(), server.log()


def test_uwsgi_without_gevent_loads_no_application_that_needs_it() -> None:
    """The error names the option; with ``--need-app`` uWSGI ends."""
    env = {"GUARD": "1", "ASYNC_MODE": "gevent_uwsgi"}
    server = UwsgiServer(CONNECTION_APP, env=env, arguments=("--need-app",), is_gevent=False)
    try:
        server.launch()
        wait_until(lambda: not server.is_alive(), timeout=_SOON)
        assert "start uWSGI with --gevent 1000" in server.log()
    finally:
        server.close()
