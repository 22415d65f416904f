from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import requests
import websocket

from tests.example.deployed import INSTALLED_CONFIG, DeployedServer
from tests.example.farewell_app import FAREWELL, SLOW, SLOW_DURATION
from tests.support import DeadlineExceeded, RawClient, wait_until
from tests.support.raw_clients import RawWebSocket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

    from tests.support import RedisServer

    Deploy = Callable[..., DeployedServer]
    MakeClient = Callable[..., RawClient]

pytestmark = pytest.mark.timeout(60)

MAX_CONNECTIONS = 5
POOL = MAX_CONNECTIONS + 64  # what the configuration makes of it
SERVICE_RESTART = 1012
FAREWELL_APP = "tests.example.farewell_app:create_app()"
HANDSHAKE = "/socket.io/?EIO=4&transport="


@pytest.fixture(scope="module")
def crowded() -> Iterator[tuple[DeployedServer, list[RawClient]]]:
    """A server, and as many clients on WebSockets as it accepts; every test leaves it so."""
    server = DeployedServer(env={"SOCKETIO_GUARD_MAX_CONNECTIONS": str(MAX_CONNECTIONS)})
    clients = []
    try:
        server.start(path="/readyz")
        for _ in range(MAX_CONNECTIONS):
            client = RawClient(server.websocket_url)
            clients.append(client)
            client.open()
        yield server, clients
    finally:
        for client in clients:
            client.close()
        server.close()


def knock(server: DeployedServer) -> tuple[int, bytes]:
    """Open a WebSocket that is refused; return the opcode and the body of what is received."""
    client = websocket.create_connection(f"{server.websocket_url}{HANDSHAKE}websocket", timeout=5)
    try:
        # The client library checks the code, and raises if it is none.
        frame = client.recv_frame()
        return frame.opcode, frame.data
    finally:
        client.shutdown()


def enter(server: DeployedServer) -> RawClient | None:
    """Return a client that the server let in, or None."""
    client = RawClient(server.websocket_url)
    try:
        client.open(timeout=0.5)
    except DeadlineExceeded:
        client.close()
        return None
    return client


def test_client_beyond_the_limit_is_refused_and_health_is_answered(
    crowded: tuple[DeployedServer, list[RawClient]],
) -> None:
    """A full house has slots left to refuse clients and to answer the load balancer."""
    server, clients = crowded
    refused = server.get(f"{HANDSHAKE}polling")
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "5"
    assert server.get("/healthz").status_code == 200
    assert all(client.is_open() for client in clients)


def test_websocket_beyond_the_limit_is_refused_before_it_is_one(
    crowded: tuple[DeployedServer, list[RawClient]],
) -> None:
    """A client that is told by HTTP need not wait for its own timeout."""
    server, _ = crowded
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        knock(server)
    assert refused.value.status_code == 503
    assert refused.value.resp_headers["retry-after"].isdigit()
    assert server.get("/healthz").status_code == 200


def test_client_is_let_in_when_another_has_left(
    crowded: tuple[DeployedServer, list[RawClient]],
) -> None:
    """The limit counts those who are there."""
    server, clients = crowded
    clients.pop().close()
    clients.append(wait_until(lambda: enter(server), message="nobody is let in"))
    assert server.get(f"{HANDSHAKE}polling").status_code == 503


def test_refused_clients_that_stay_hold_no_slot(
    crowded: tuple[DeployedServer, list[RawClient]],
) -> None:
    """More of them than there are slots: the server closes what it has refused."""
    server, _ = crowded
    request = (
        f"GET {HANDSHAKE}websocket HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with ExitStack() as stack:
        for _ in range(POOL + 10):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=5)
            stack.enter_context(client)
            client.sendall(request.encode())
            answer = client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 503")
        assert server.get("/healthz", timeout=5).status_code == 200


def test_request_of_an_accepted_client_is_never_refused(
    crowded: tuple[DeployedServer, list[RawClient]],
) -> None:
    """A session id that is there is served, wherever in the query it stands; others are not."""
    server, clients = crowded
    frame = clients[0].wait_for_frame("0{")
    sid = json.loads(frame[1:])["sid"]
    # Engine.IO answers a poll of a client that has its WebSocket with a 400, and not with a 503.
    assert server.get(f"{HANDSHAKE}polling&sid={sid}").status_code == 400
    assert server.get(f"{HANDSHAKE}polling&xsid=1").status_code == 503


@pytest.mark.parametrize("arguments", [(), ("--preload",)], ids=["plain", "preload"])
def test_guard_runs_before_the_first_request(
    make_redis: Callable[[], RedisServer], deploy: Deploy, arguments: tuple[str, ...]
) -> None:
    """The hook starts it, also where the application was loaded by the master."""
    redis_server = make_redis()
    server = deploy(env={"FLASK_MESSAGE_QUEUE": redis_server.url}, arguments=arguments)
    wait_until(
        lambda: redis_server.subscribers() == 1, timeout=30, message="the listener does not start"
    )
    server.wait_until_serving(path="/livez")
    health = server.get("/readyz")
    assert (health.status_code, health.json()) == (200, {"status": "pass", "listener": "running"})
    assert redis_server.subscribers() == 1


def test_stopping_worker_ends_its_tasks_and_empties_its_outbox(
    make_redis: Callable[[], RedisServer], deploy: Deploy, raw_client: MakeClient
) -> None:
    """With a client that stays connected, as there always is one in a deployment."""
    redis_server = make_redis()
    server = deploy(FAREWELL_APP, env={"REDIS_URL": redis_server.url})
    server.wait_until_serving(path="/readyz")
    raw_client(server)
    (worker,) = server.worker_pids()
    with redis_server.client() as client, client.pubsub() as subscription:
        subscription.subscribe("flask-socketio")
        server.ask_to_stop()
        said = wait_until(
            lambda: _farewell(subscription), timeout=10, message="the task did not end in order"
        )
    assert said["data"] == [{"pid": worker}]
    wait_until(lambda: not server.is_alive(), timeout=15, message="the server does not end")
    assert "Worker exiting" in server.log()
    assert "Traceback" not in server.log()
    assert "SIGKILL" not in server.log()


def test_stopping_worker_tells_what_it_could_not_send(
    make_redis: Callable[[], RedisServer], deploy: Deploy
) -> None:
    """The broker is away for good: the worker gives up in time, and the loss has a number."""
    redis_server = make_redis()
    env = {
        "REDIS_URL": redis_server.url,
        "FLASK_SOCKETIO_GUARD_EXIT_FLUSH_TIMEOUT": "0.5",
    }
    server = deploy(FAREWELL_APP, env=env)
    server.wait_until_serving(path="/readyz")
    redis_server.kill()
    assert server.stop(timeout=10)
    assert re.search(r"^1 message.* dropped: exit$", server.log(), re.MULTILINE), server.log()


def test_stopping_server_ends_requests_and_waits_for_nobody_who_is_idle(
    make_redis: Callable[[], RedisServer], deploy: Deploy
) -> None:
    """Clients are told to come back elsewhere, a request is answered, and then it is over."""
    server = deploy(FAREWELL_APP, env={"REDIS_URL": make_redis().url})
    server.wait_until_serving(path="/readyz")
    with requests.Session() as idle, RawWebSocket(server.port) as client:
        assert idle.get(f"{server.url}/livez", timeout=5).status_code == 200
        client.open().join()
        with ThreadPoolExecutor() as pool:
            farewell = pool.submit(poll_to_the_end, server, enter_by_polling(server))
            answer = pool.submit(server.get, "/slow")
            wait_until(lambda: SLOW in server.log(), message="the request does not come")
            server.ask_to_stop()
            began_at = time.monotonic()
            assert client.read_to_end().code == SERVICE_RESTART
            # With a close packet it would stay away; after an error it comes back.
            assert farewell.result() == 400
            assert (answer.result().status_code, answer.result().text) == (200, "done")
        wait_until(lambda: not server.is_alive(), timeout=15, message="the server does not end")
    # Its graceful timeout is 30 s; the rest is for a busy machine.
    assert time.monotonic() - began_at < SLOW_DURATION + 10.0
    assert "Worker exiting" in server.log()
    assert "SIGKILL" not in server.log()
    assert "Traceback" not in server.log()


def test_the_configuration_imports_nothing_that_has_to_be_patched() -> None:
    """The master reads it, and its workers patch the standard library only after that."""
    script = (
        "import sys, flask_socketio_guard_gunicorn\n"
        "print(*{'ssl', 'socket', 'redis', 'flask_socketio_guard'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "\n"), answer.stderr


def test_server_without_clients_stops_soon(deploy: Deploy) -> None:
    """What is granted to requests is not waited for when there are none."""
    server = deploy(config=INSTALLED_CONFIG)
    server.wait_until_serving(path="/readyz")
    assert server.stop(timeout=5)
    assert "Worker exiting" in server.log()


def enter_by_polling(server: DeployedServer) -> str:
    """Connect a client that polls; return its Engine.IO session id."""
    sid: str = json.loads(server.get(f"{HANDSHAKE}polling").text[1:])["sid"]
    assert server.request("POST", f"{HANDSHAKE}polling&sid={sid}", data="40").text == "OK"
    assert server.get(f"{HANDSHAKE}polling&sid={sid}").text.startswith("40")
    return sid


def poll_to_the_end(server: DeployedServer, sid: str) -> int:
    """Poll while that is answered with events; return the status of the other answer."""
    while (status := server.get(f"{HANDSHAKE}polling&sid={sid}").status_code) == 200:
        pass
    return status


def _farewell(subscription: redis.client.PubSub) -> dict[str, Any] | None:
    message = subscription.get_message(ignore_subscribe_messages=True, timeout=0.1)
    if message is None or FAREWELL.encode() not in message["data"]:
        return None
    said: dict[str, Any] = json.loads(message["data"])
    return said
