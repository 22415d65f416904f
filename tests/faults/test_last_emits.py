"""What a process emits last, before it ends without a word; and what a child has of its parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.fleet import NOISE, wait_until_delivering
from tests.faults.forking_app import FORKING_APP
from tests.faults.watches import PLAIN_GEVENT_WORKER
from tests.support import wait_until
from tests.support.processes import end_process, start_process
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.fleet import Fleet
    from tests.support import RedisServer, SocketIOClient

    Connect = Callable[..., SocketIOClient]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

EVENTS = 5
beside_stock = pytest.mark.parametrize("guard", ["0", "1"], ids=["stock", "guarded"])


class Channel:
    """Hears what is published."""

    def __init__(self, redis: RedisServer) -> None:
        self._client = redis.client()
        self._pubsub: Any = self._client.pubsub(  # type: ignore[no-untyped-call]
            ignore_subscribe_messages=True
        )
        self._pubsub.subscribe("flask-socketio")
        wait_until(lambda: redis.subscribers() >= 1)

    def numbers(self, event: str, *, count: int, timeout: float = 3.0) -> list[Any]:
        """Return what events of that name carried, when *count* have come or time is up."""
        found: list[Any] = []
        deadline = time.monotonic() + timeout
        while len(found) < count and time.monotonic() < deadline:
            message = self._pubsub.get_message(timeout=0.1)
            data = json.loads(message["data"]) if message else {}
            if data.get("event") == event:
                found.append(data["data"][0])
        return found

    def close(self) -> None:
        """Hear no more."""
        self._pubsub.close()
        self._client.close()


@pytest.fixture
def channel(redis_server: RedisServer) -> Iterator[Channel]:
    """The channel of this module's Redis."""
    channel = Channel(redis_server)
    yield channel
    channel.close()


def run(command: list[str], *, timeout: float = 30.0, **env: str) -> float:
    """Run a Python program to its end; return how long it took, in seconds."""
    began_at = time.monotonic()
    process = start_process(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT), **env}
    )
    try:
        assert process.wait(timeout) == 0
    finally:
        end_process(process)
    return time.monotonic() - began_at


@pytest.mark.parametrize(
    ("form", "how", "guard"),
    [
        ("write-only", "exit", "0"),  # stock: what is to be kept
        ("write-only", "exit", "1"),
        ("write-only", "fork", "1"),
        ("write-only", "spawn", "1"),
        ("write-only", "os-fork", "1"),
        ("app", "exit", "1"),
        ("app", "fork", "1"),
    ],
)
def test_the_last_emit_of_a_process_that_ends_without_a_word_arrives(
    form: str, how: str, guard: str, redis_server: RedisServer, channel: Channel
) -> None:
    """It ends by ``os._exit``, as do the children of multiprocessing."""
    command = ["-m", "tests.faults.last_emits", how]
    run(command, REDIS_URL=redis_server.url, GUARD=guard, FORM=form)
    assert channel.numbers("last", count=EVENTS) == list(range(EVENTS))


def test_what_is_emitted_in_functions_that_run_at_exit_arrives(
    redis_server: RedisServer, channel: Channel
) -> None:
    """Also in those that run after the guard's, which has flushed what was there before."""
    command = ["-m", "tests.faults.last_emits", "at-exit"]
    run(command, REDIS_URL=redis_server.url, GUARD="1", FORM="app", MODE="threading")
    assert channel.numbers("last", count=EVENTS) == list(range(EVENTS))


def test_a_child_of_multiprocessing_flushes_when_it_ends(
    make_redis: Callable[[], RedisServer], measured: Measured
) -> None:
    """Redis hangs: an emit waits for a while, and then the end of the child for a while more."""
    redis = make_redis()
    channel = Channel(redis)
    redis.pause()
    process = start_process(
        [sys.executable, "-m", "tests.faults.last_emits", "late"],
        env={
            **os.environ,
            "PYTHONPATH": str(PROJECT_ROOT),
            "REDIS_URL": redis.url,
            "GUARD": "1",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        with process.stdout as lines:
            took = float(lines.readline())
        redis.resume()
        assert process.wait(10) == 0
    finally:
        redis.resume()
        end_process(process)
    measured("emits took", took)
    assert took < 2.0 + NOISE  # not one second, the bound, for each
    assert channel.numbers("last", count=EVENTS) == list(range(EVENTS))
    channel.close()


@beside_stock
def test_the_last_emit_of_a_job_arrives(
    guard: str, redis_server: RedisServer, channel: Channel
) -> None:
    """RQ forks a work horse for each job, which ends by ``os._exit``."""
    from rq import Queue

    with redis_server.client() as client:
        Queue(connection=client).enqueue("tests.faults.last_emits.work")
    run(
        ["-m", "rq.cli", "worker", "--burst", "--quiet", "--url", redis_server.url],
        REDIS_URL=redis_server.url,
        GUARD=guard,
    )
    assert channel.numbers("last", count=EVENTS) == list(range(EVENTS))


@pytest.mark.parametrize(
    ("async_mode", "arguments"),
    [("gevent", ()), ("gevent", PLAIN_GEVENT_WORKER), ("threading", ())],
    ids=["gevent-websocket", "gevent", "threading"],
)
def test_a_child_of_a_process_that_serves_has_nothing_of_its_parent(
    arguments: tuple[str, ...],
    make_fleet: Callable[..., Fleet],
    sio_client: Connect,
    measured: Measured,
) -> None:
    """It is forked right behind an emit, and lives on for a while."""
    fleet = make_fleet(app=FORKING_APP, processes=1, arguments=arguments)
    clients = [sio_client(fleet.a), sio_client(fleet.a, transports=("polling",))]
    wait_until_delivering(fleet.a, clients[0])
    (pid,) = fleet.a.worker_pids()
    with ThreadPoolExecutor(1) as requests:
        forking = requests.submit(fleet.a.post, "/fork", count=EVENTS, seconds=1.0)
        clients[0].wait_for("child", count=EVENTS)
        while not forking.done():  # whom would the child answer, if it could?
            assert [client.call("pid") for client in clients] == [pid, pid]
            assert fleet.a.get("/").text == "here"
    for client in clients:
        client.wait_for("tables")
        for event in ("parent", "child"):
            numbers = [item.args[0] for item in client.events(event)]
            measured(event, numbers)
            assert numbers == list(range(EVENTS))
        assert client.events("tables")[0].args == ({"sockets": 0, "rooms": 0, "environ": 0},)
    fleet.a.post("/fork", count=EVENTS, seconds=0.1)
    for client in clients:
        client.wait_for("child", count=2 * EVENTS)
        assert client.call("echo", "still here") == "still here"
        assert len(client.events("parent")) == len(client.events("child")) == 2 * EVENTS
        assert {item.args[0] for item in client.events("tick")} == {pid}
    records = fleet.a.records(matching=lambda record: record.level in {"WARNING", "ERROR"})
    assert records == []
