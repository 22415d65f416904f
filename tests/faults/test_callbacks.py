"""Acknowledgement callbacks that raise, hang, are slow or are never called."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest
import requests

from tests.faults.fleet import (
    NOISE,
    Fleet,
    count_delivered,
    counter,
    runs,
    wait_until_delivering,
)
from tests.support import DeadlineExceeded, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import GunicornServer, RawClient, SocketIOClient

    Connect = Callable[..., SocketIOClient]
    ConnectRaw = Callable[..., RawClient]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])

CALLBACK_RAISES = "ack callback raises `Exception`, local and remote client"
CALLBACK_RAISES_BASE_EXCEPTION = (
    "ack callback raises `GreenletExit`, another `BaseException`, an uncaught `gevent.Timeout`, "
    "remote client"
)
CALLBACK_RAISES_SYSTEM_EXIT = "ack callback raises `SystemExit`, remote client"
CALLBACK_HANGS = "ack callback takes 30 s or hangs, client on the other process"
LOCAL_CALLBACK_BLOCKS = "local callback of 8 s; `call()` inside a callback"
CLIENT_VANISHES = "client vanishes while `call()` waits for it"
CALLBACKS_STAY = "callbacks to unknown, foreign, empty-room or silent recipients, 1,000 each"


def make_callback_fail(server: GunicornServer, client: SocketIOClient, behaviour: str) -> None:
    """Ask *client* with a callback of that behaviour, and wait until the callback runs."""
    before = runs(server, f"callback:{behaviour}")
    server.post("/ask", to=client.sid, behaviour=behaviour)
    wait_until(
        lambda: runs(server, f"callback:{behaviour}") == before + 1,
        message="the callback was not run",
    )


def assert_recorded(server: GunicornServer, *, failures_before: int, since: float) -> None:
    """Assert that one failed callback was counted and logged, with a traceback and an id."""
    wait_until(
        lambda: counter(server, "callback_failures") == failures_before + 1,
        timeout=2,
        message="the failed callback was not recorded",
    )
    records = server.records(
        since=since,
        matching=lambda record: record.logger == "flask_socketio_guard" and record.level == "ERROR",
    )
    assert len(records) == 1
    assert records[0].has_traceback
    assert records[0].error_id
    assert records[0].error_id in records[0].message


@pytest.mark.faults(CALLBACK_RAISES, stock="logged, not counted", because="was not recorded")
@pytest.mark.parametrize("place", ["local", "remote"])
@both_modes
def test_callback_that_raises_an_exception_is_recorded_and_events_flow(
    place: str, fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """A callback raises an ordinary exception."""
    witness = sio_client(fleet.a)
    asked = sio_client(fleet.a if place == "local" else fleet.b)
    wait_until_delivering(fleet.b, witness)
    failures_before, since = counter(fleet.a, "callback_failures"), time.time()
    make_callback_fail(fleet.a, asked, "Exception")
    measured("next event after", wait_until_delivering(fleet.b, witness))
    assert_recorded(fleet.a, failures_before=failures_before, since=since)


@pytest.mark.faults(
    CALLBACK_RAISES_BASE_EXCEPTION,
    stock="listener dead forever, nothing logged, Redis still counts the subscriber",
    because="the listener is deaf",
)
@pytest.mark.parametrize(
    ("async_mode", "behaviour"),
    [
        ("gevent", "GreenletExit"),
        ("gevent", "BaseException"),
        ("gevent", "Timeout"),
        ("threading", "BaseException"),
    ],
)
def test_callback_that_raises_a_base_exception_is_recorded_and_events_flow(
    behaviour: str, fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """A callback raises what ``except Exception`` does not catch."""
    witness, asked = sio_client(fleet.a), sio_client(fleet.b)
    wait_until_delivering(fleet.b, witness)
    failures_before, since = counter(fleet.a, "callback_failures"), time.time()
    make_callback_fail(fleet.a, asked, behaviour)
    measured("next event after", wait_until_delivering(fleet.b, witness))
    assert_recorded(fleet.a, failures_before=failures_before, since=since)


@pytest.mark.faults(
    CALLBACK_RAISES_SYSTEM_EXIT,
    stock="worker exits (1) / gunicorn's master stops and nothing serves (3) / deaf (threads)",
    because="gunicorn's master stopped|the worker was replaced|the listener is deaf",
)
@pytest.mark.parametrize(
    ("async_mode", "behaviour"),
    [("gevent", "SystemExit1"), ("gevent", "SystemExit3"), ("threading", "SystemExit1")],
)
def test_callback_that_raises_system_exit_is_recorded_and_the_same_worker_serves(
    behaviour: str, fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """A callback calls ``sys.exit``."""
    witness, asked = sio_client(fleet.a), sio_client(fleet.b)
    wait_until_delivering(fleet.b, witness)
    workers = fleet.a.worker_pids()
    failures_before, since = counter(fleet.a, "callback_failures"), time.time()
    fleet.a.post("/ask", to=asked.sid, behaviour=behaviour)
    with contextlib.suppress(DeadlineExceeded, requests.RequestException):
        wait_until(lambda: counter(fleet.a, "callback_failures") > failures_before, timeout=2)
    witness.disconnected.wait(0.5)
    if witness.disconnected.is_set():
        # The end of the worker takes the master a moment to notice and to answer.
        wait_until(
            lambda: not fleet.a.is_alive() or fleet.a.worker_pids() not in ([], workers),
            message="the worker has ended, and gunicorn does nothing about it",
        )
    assert fleet.a.is_alive(), "gunicorn's master stopped"
    assert fleet.a.worker_pids() == workers, "the worker was replaced"
    measured("next event after", wait_until_delivering(fleet.b, witness))
    assert_recorded(fleet.a, failures_before=failures_before, since=since)


@pytest.mark.faults(
    CALLBACK_HANGS,
    stock="every event between the processes waits (0 of 40 arrive)",
    because="0 of 40 events arrived",
)
@pytest.mark.parametrize(
    ("async_mode", "behaviour"),
    [("gevent", "sleep-long"), ("gevent", "hang"), ("threading", "hang")],
)
def test_callback_that_takes_long_delays_no_event_between_processes(
    behaviour: str, fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """A callback for a client on the other process takes 30 s, or never returns."""
    witness, asked = sio_client(fleet.a), sio_client(fleet.b)
    wait_until_delivering(fleet.b, witness)
    make_callback_fail(fleet.a, asked, behaviour)
    began_at = time.monotonic()
    delivered = count_delivered(fleet.b, witness, count=40, timeout=3)
    measured("40 events", time.monotonic() - began_at if delivered == 40 else f"{delivered} of 40")
    assert delivered == 40, f"{delivered} of 40 events arrived"


@pytest.mark.faults(
    "disconnect handler hangs, asked for by the other process",
    stock="that process is deaf",
    because="0 of 40 events arrived",
)
@both_modes
def test_disconnect_handler_that_hangs_delays_no_event_between_processes(
    fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """One process asks the other to disconnect a client, whose disconnect handler hangs."""
    witness, leaving = sio_client(fleet.b), sio_client(fleet.b, query="disconnect=hang")
    wait_until_delivering(fleet.a, witness)
    before = runs(fleet.b, "disconnect")
    fleet.a.post("/disconnect", sid=leaving.sid)
    wait_until(
        lambda: runs(fleet.b, "disconnect") > before, message="the disconnect handler was not run"
    )
    began_at = time.monotonic()
    delivered = count_delivered(fleet.a, witness, count=40, timeout=3)
    measured("40 events", time.monotonic() - began_at if delivered == 40 else f"{delivered} of 40")
    assert delivered == 40, f"{delivered} of 40 events arrived"
    assert leaving.disconnected.wait(2.0)


@pytest.mark.faults(
    LOCAL_CALLBACK_BLOCKS,
    stock="client times out on ping",
    because="the client was disconnected",
)
def test_slow_local_callback_does_not_cost_the_client_its_connection(
    make_fleet: Callable[..., Fleet], sio_client: Connect, measured: Measured
) -> None:
    """The callback of a local client takes 8 s, longer than the ping timeout."""
    server = make_fleet(
        processes=1, has_queue=False, socketio={"ping_interval": 2, "ping_timeout": 2}
    ).a
    client = sio_client(server)
    asked_at = time.monotonic()
    make_callback_fail(server, client, "sleep")
    client.disconnected.wait(8.0 + NOISE)
    if client.disconnected.is_set():
        measured("disconnected after", time.monotonic() - asked_at)
    assert not client.disconnected.is_set(), "the client was disconnected"
    wait_until(lambda: runs(server, "callback:sleep:done") == 1, message="the callback did not end")
    assert client.call("echo", "still there") == "still there"


@pytest.mark.faults(
    LOCAL_CALLBACK_BLOCKS,
    stock="`call()` inside a callback never returns",
    because="call\\(\\) inside the callback got no answer",
)
@both_modes
def test_call_inside_a_callback_is_answered(
    fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """The callback of a local client asks that client a question and waits for the answer."""
    client = sio_client(fleet.a, answer=lambda event, value: f"answer to {value}")
    asked_at = time.monotonic()
    make_callback_fail(fleet.a, client, "call")
    answer = wait_until(
        lambda: fleet.a.state()["outcomes"].get("call"), message="call() does not end"
    )
    measured("call ended after", time.monotonic() - asked_at)
    assert answer == "answer to again", f"call() inside the callback got no answer: {answer}"


@pytest.mark.faults(
    CLIENT_VANISHES,
    stock="`call()` waits for its whole timeout",
    because=r"call\(\) still waits",
)
@pytest.mark.parametrize("place", ["local", "remote"])
def test_call_ends_at_once_when_the_client_is_known_to_be_gone(
    place: str,
    fleet: Fleet,
    sio_client: Connect,
    raw_client: ConnectRaw,
    measured: Measured,
) -> None:
    """A client is asked and vanishes; the timeout of ``call()`` is 10 s."""
    witness = sio_client(fleet.b)
    wait_until_delivering(fleet.a, witness)
    asked = raw_client(fleet.a if place == "local" else fleet.b)
    fleet.a.post("/call", to=asked.sid)
    wait_until(lambda: asked.events("question"), message="the client was not asked")
    vanished_at = time.monotonic()
    asked.vanish()
    outcome, _ = wait_until(
        lambda: fleet.a.state()["outcomes"].get(asked.sid),
        timeout=3,
        message="call() still waits",
    )
    measured("ended after", time.monotonic() - vanished_at)
    assert "ConnectionClosed" in outcome


@pytest.mark.faults(
    CALLBACKS_STAY,
    stock="3,000 entries stay forever; one dict per remote sid even after an ack",
    because="[34]\\d\\d\\d entries for 4 recipients stay",
)
def test_callbacks_that_nobody_answers_are_dropped_after_their_deadline(
    make_fleet: Callable[..., Fleet],
    sio_client: Connect,
    raw_client: ConnectRaw,
    measured: Measured,
) -> None:
    """Callbacks wait for recipients that do not exist, or never answer."""
    # A thousand answers have to come within the deadline, also on a busy machine.
    fleet = make_fleet(config={"SOCKETIO_GUARD_CALLBACK_TIMEOUT": 12.0})
    foreign, silent = sio_client(fleet.b), raw_client(fleet.a)
    wait_until_delivering(fleet.a, foreign)
    before = runs(fleet.a, "callback:return")
    for recipient in ("nobody", "/an-empty-room", foreign.sid, silent.sid):
        fleet.a.post("/ask", to=recipient, count=1000)
    wait_until(
        lambda: runs(fleet.a, "callback:return") == before + 1000,
        timeout=12,
        message="the answers of the remote client did not all come back",
    )
    assert len(silent.events("question")) == 1000

    def remembered() -> tuple[int, int]:
        state = fleet.a.state()
        waiting = state["guard"]["waiting_callbacks"] if state["guard"] else 0
        tables = state["tables"]
        return tables["callback_entries"] + waiting, tables["callback_recipients"]

    answered_at = time.monotonic()
    try:
        wait_until(lambda: remembered() == (0, 0), timeout=24, interval=0.1)
    except DeadlineExceeded:
        entries, recipients = remembered()
        measured("left", f"{entries} entries for {recipients} recipients")
        raise AssertionError(f"{entries} entries for {recipients} recipients stay") from None
    measured("empty after", time.monotonic() - answered_at)
    guard = fleet.a.state()["guard"]
    assert (
        guard["counters"]["callbacks_expired"] + guard["counters"].get("callbacks_dropped", 0)
        == 3000
    )
    assert fleet.b.state()["tables"]["callback_entries"] == 0
