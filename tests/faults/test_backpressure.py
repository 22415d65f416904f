"""Clients that send thousands of events at once, as browsers do that were offline."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import socketio as python_socketio

from tests.faults.arrivals_app import ARRIVALS_APP
from tests.faults.fleet import counter
from tests.faults.watches import MIB
from tests.support import wait_until
from tests.support.javascript import run_script
from tests.support.raw_clients import PollingClient, RawWebSocket
from tests.support.raw_websocket import text_frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer

    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])
both_transports = pytest.mark.parametrize("transport", ["websocket", "polling"])
COUNT = 3000
MAX_IN_FLIGHT = 8
NARROW = {
    "SOCKETIO_GUARD_MAX_WAITING_BYTES": 64 * 1024,
    "SOCKETIO_GUARD_MAX_IN_FLIGHT": MAX_IN_FLIGHT,
}
"""Room for some sixty waiting events."""
QUICK_PINGS = {"ping_interval": 1, "ping_timeout": 1}


@pytest.fixture
def server(make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """One process, and nothing noted yet."""
    server = make_fleet(app=ARRIVALS_APP, processes=1, has_queue=False).a
    server.get("/notes?reset=1")
    return server


@pytest.fixture
def narrow(make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """The same, with little room for events that wait, and quick pings."""
    server = make_fleet(
        app=ARRIVALS_APP,
        processes=1,
        has_queue=False,
        config=NARROW,
        socketio=QUICK_PINGS,
    ).a
    server.get("/notes?reset=1")
    return server


@pytest.fixture
def forgetful(make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """One process that gives up soon what a client has left behind."""
    return make_fleet(
        app=ARRIVALS_APP,
        processes=1,
        has_queue=False,
        config={"SOCKETIO_GUARD_DEPARTURE_TIMEOUT": 0.5},
        socketio=QUICK_PINGS,
    ).a


def handled(server: GunicornServer, kind: str = "last") -> list[Any]:
    """Return the numbers of the events that have been handled, in this order."""
    return [found[2] for found in server.get("/notes").json() if found[0] == kind]


@pytest.mark.sampled(2)
@both_modes
@both_transports
def test_what_a_browser_kept_while_it_was_offline_is_handled(
    server: GunicornServer, transport: str, measured: Measured
) -> None:
    """3,000 events wait in the client, and go out in one piece."""
    script = """
    const s = io(args[0], { transports: [args[1]], autoConnect: false });
    let acknowledged = 0;
    for (let i = 0; i < args[2]; i++) s.emit("last", i, 0.001, () => {
      if (++acknowledged == args[2]) { console.log(acknowledged); s.close(); }
    });
    s.on("disconnect", (reason) => { if (acknowledged < args[2]) {
      console.log(JSON.stringify([acknowledged, reason])); process.exit(); } });
    s.connect();
    """
    began_at = time.monotonic()
    assert run_script(script, server.url, transport, COUNT, timeout=40) == COUNT
    measured("took", time.monotonic() - began_at)
    assert sorted(handled(server)) == list(range(COUNT))
    assert counter(server, "events_rejected") == 0


@pytest.mark.sampled(2)
@both_modes
@both_transports
def test_a_burst_of_the_client_for_python_is_handled(
    server: GunicornServer, transport: str
) -> None:
    with python_socketio.SimpleClient() as client:
        client.connect(server.url, transports=[transport])
        for number in range(COUNT):
            client.emit("last", (number, 0.001))
        wait_until(lambda: len(handled(server)) == COUNT, timeout=30, interval=0.1)
    assert sorted(handled(server)) == list(range(COUNT))


@pytest.mark.sampled(2)
@both_modes
@both_transports
def test_a_client_with_too_many_waiting_events_is_not_read_and_loses_nothing(
    narrow: GunicornServer, transport: str, measured: Measured
) -> None:
    """Far more than may wait, to handlers that take longer than pings: no ping timeout either."""
    count = 250
    script = """
    const s = io(args[0], { transports: [args[1]], reconnection: false });
    let acknowledged = 0;
    const seconds = (i) => i < 8 ? 3.5 : 0.02;
    s.on("connect", () => { for (let i = 0; i < args[2]; i++) s.emit("last", i, seconds(i), () => {
      if (++acknowledged == args[2]) { console.log(acknowledged); s.close(); }
    }); });
    s.on("disconnect", (reason) => { if (acknowledged < args[2]) {
      console.log(JSON.stringify([acknowledged, reason])); process.exit(); } });
    """
    began_at = time.monotonic()
    assert run_script(script, narrow.url, transport, count, timeout=40) == count
    measured("took", time.monotonic() - began_at)
    assert sorted(handled(narrow)) == list(range(count))


def test_a_request_that_would_wait_for_long_is_answered_in_time(narrow: GunicornServer) -> None:
    """Engine.IO's client for Python gives a request up after five seconds."""
    count = 90
    with python_socketio.SimpleClient(reconnection=False) as client:
        client.connect(narrow.url, transports=["polling"])
        for number in range(count):
            client.emit("last", (number, 6.0 if number < MAX_IN_FLIGHT else 0.0))
        wait_until(lambda: len(handled(narrow)) == count, timeout=25, interval=0.1)
        assert client.call("echo", "still there", timeout=10) == "still there"


@pytest.mark.sampled(2)
@both_modes
@both_transports
def test_an_answer_behind_events_that_wait_is_read(
    narrow: GunicornServer, transport: str, measured: Measured
) -> None:
    """All that may run wait for answers of the client, which are behind more than may wait."""
    count = 300
    script = """
    const s = io(args[0], { transports: [args[1]], reconnection: false });
    let acknowledged = 0;
    s.on("question", (number, ack) => ack(number));
    s.on("connect", () => { for (let i = 0; i < args[2]; i++) s.emit("call", i, (answer) => {
      if (answer === i && ++acknowledged == args[2]) { console.log(acknowledged); s.close(); }
    }); });
    s.on("disconnect", (reason) => { if (acknowledged < args[2]) {
      console.log(JSON.stringify([acknowledged, reason])); process.exit(); } });
    """
    began_at = time.monotonic()
    assert run_script(script, narrow.url, transport, count, timeout=30) == count
    took = time.monotonic() - began_at
    measured("took", took)
    assert took < 15, f"answers were not read for {took:.0f} s"


@both_modes
def test_a_request_of_400000_packets_keeps_nobody_waiting(server: GunicornServer) -> None:
    client = PollingClient(server.port, timeout=30).open().join()
    posting = client.begin("POST", "\x1e".join(["3"] * 400_000))
    began_at = time.monotonic()
    assert server.get("/ping").text == "pong"
    assert time.monotonic() - began_at < 1
    assert posting.read_answer().status == 200
    client.vanish()


@both_modes
def test_one_request_at_a_time_waits_for_room(narrow: GunicornServer) -> None:
    """As many as a client cares to send would take all workers or threads."""
    packets = ['42["last",1,2]'] * 100

    def second() -> int:
        """Return the status of a request that comes while another one of that client waits."""
        narrow.get("/notes?reset=1")
        client = PollingClient(narrow.port, timeout=20).open().join()
        try:
            waiting = client.begin("POST", "\x1e".join(packets))
            wait_until(lambda: len(handled(narrow)) >= MAX_IN_FLIGHT)
            status = client.post(*packets).status
            waiting.read_answer()
            return status
        finally:
            client.vanish()

    # The first one is answered before the ping timeout, and a busy machine may be slower than that.
    assert wait_until(lambda: second() == 400, timeout=20)


@pytest.mark.alone
@pytest.mark.sampled(2)
@both_modes
@both_transports
def test_a_flood_of_events_costs_bounded_memory(
    forgetful: GunicornServer, transport: str, measured: Measured
) -> None:
    """100 MB of events to slow handlers, as fast as the server takes them."""
    worker = psutil.Process(forgetful.worker_pids()[0])
    before = worker.memory_info().rss
    is_over = threading.Event()
    sent = [0]
    packet = "42" + json.dumps(["last", "x" * 1000, 3.0])

    client = RawWebSocket(forgetful.port, timeout=60)

    def flood() -> None:
        try:
            if transport == "polling":
                polling = PollingClient(forgetful.port, timeout=60).open().join()
                while not is_over.is_set() and sent[0] < 100e6:
                    polling.post(*[packet] * 500)
                    sent[0] += 500 * len(packet)
            else:
                frames = text_frame(packet) * 500
                client.open().join()
                while not is_over.is_set() and sent[0] < 100e6:
                    client.write(frames)
                    sent[0] += len(frames)
        except (OSError, AssertionError):
            return  # it is cut off at the end

    flooder = threading.Thread(target=flood, daemon=True)
    flooder.start()
    slowest, most = 0.0, 0
    before_that, steady_at = -1, time.monotonic()
    until = time.monotonic() + 15
    while time.monotonic() < min(until, steady_at + 1):
        began_at = time.monotonic()
        assert forgetful.get("/ping").text == "pong"
        slowest = max(slowest, time.monotonic() - began_at)
        most = max(most, worker.memory_info().rss)
        if sent[0] > before_that:
            before_that, steady_at = sent[0], time.monotonic()
    is_over.set()
    client.shut()
    flooder.join(10.0)
    wait_until(lambda: not any(forgetful.state()["tables"].values()), timeout=10)
    measured("sent", f"{sent[0] / MIB:.0f} MiB")
    measured("grown by", f"{(most - before) / MIB:.0f} MiB")
    measured("others wait at most", slowest)
    assert steady_at < until - 1, "it was read on"
    assert sent[0] < 100e6, "it was read on"
    assert most - before < 24 * MIB
    assert slowest < 1
