"""Emits from threads that gevent knows nothing of, and code that freezes the event loop."""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.fleet import NOISE, counter
from tests.faults.watches import FLOOD_APP, milliseconds
from tests.support import DeadlineExceeded, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import GunicornServer, RawClient

    Connect = Callable[..., RawClient]
    Measured = Callable[[str, object], None]

pytestmark = [pytest.mark.timeout(60), pytest.mark.alone]

NATIVE_THREAD = "emit from a native thread under gevent"
BLOCKED_LOOP = "a call blocks the event loop"
NOTICED_WITHIN = 0.5
AT_ONCE = 0.25
"""Seconds, of the half that is served best: a machine may stop for as long as that, once.

On stock an event waits for whatever comes next, up to a second and more.
"""

_EMITS = 1000
_LENGTH = re.compile(r"(\d+\.\d+) s\b")


def with_and_without_queue(
    fault: str, *, stock: str, because: str = "it usually took"
) -> pytest.MarkDecorator:
    """Run a test without and with a message queue.

    A message queue wakes the event loop of a stock process by its own message, so there is no
    fault to show.
    """
    marker = pytest.mark.faults(fault, stock=stock, because=because)
    return pytest.mark.parametrize(
        "has_queue",
        [pytest.param(False, id="no-queue", marks=marker), pytest.param(True, id="queue")],
    )


@pytest.fixture
def server(has_queue: bool, make_fleet: Callable[..., Fleet]) -> GunicornServer:
    """One process."""
    return make_fleet(app=FLOOD_APP, processes=1, has_queue=has_queue).a


def check_delays(delays: list[float], measured: Measured) -> None:
    """See whether what was asked for at one instant came at once."""
    usual = statistics.median(delays)
    measured("usually", milliseconds(usual))
    measured("slowest", milliseconds(max(delays)))
    assert usual < AT_ONCE, f"it usually took {usual:.2f} s"


@pytest.mark.sampled(2)
@with_and_without_queue(
    NATIVE_THREAD, stock="late: they wait until something else wakes the event loop"
)
@pytest.mark.parametrize(
    ("kind", "at_a_time", "pause"),
    [
        pytest.param("thread", 1, 0.001, id="thread-steadily"),
        pytest.param("pool", 200, 0.3, id="pool-in-bursts"),
    ],
)
def test_events_emitted_in_a_native_thread_arrive_in_order_and_at_once(
    kind: str,
    at_a_time: int,
    pause: float,
    server: GunicornServer,
    raw_client: Connect,
    measured: Measured,
) -> None:
    """1,000 events from a thread of the operating system, and from gevent's pool of threads."""
    client = raw_client(server)
    values: dict[str, Any] = {"kind": kind, "at_a_time": at_a_time, "pause": pause}
    server.post("/thread/emit", to=client.sid, count=_EMITS, **values)
    # Asking the server for anything meanwhile would wake its event loop.
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: len(client.events("from-thread")) >= _EMITS, timeout=5.0, interval=0.1)
    arrived = [item.args[0] for item in client.events("from-thread")]
    measured("arrived", f"{len(arrived)} of {_EMITS}")
    assert len(arrived) == _EMITS, f"only {len(arrived)} of {_EMITS} arrived"
    assert arrived == list(range(_EMITS)), "the order is another"
    check_delays([item.at - item.args[1] for item in client.events("from-thread")], measured)
    assert server.get(f"/thread/{kind}").json() == {"is_over": True, "error": ""}


@with_and_without_queue(
    "room and disconnect calls from a native thread under gevent",
    stock="late: they wait until something else wakes the event loop",
)
def test_rooms_and_disconnect_in_a_native_thread_work_at_once_and_in_order(
    server: GunicornServer, raw_client: Connect, measured: Measured
) -> None:
    """A thread lets clients in and out of rooms, closes the rooms, and ends the clients."""
    clients, other = [raw_client(server) for _ in range(5)], raw_client(server)
    sids = [client.sid for client in clients]
    server.post("/thread/rooms", kind="thread", sids=sids, pause=0.25)
    for client in clients:
        client.wait_for_frame("41", message="a disconnect did not arrive")
    delays = [
        at - client.events("from-thread")[0].args[1]
        for client in clients
        for text, at in client.frames
        if text == "41"
    ]
    for client in clients:
        heard = [item.args[0] for item in client.events("to-room")]
        assert heard == ["joined", "joined again"]
    check_delays(delays, measured)
    assert server.get("/thread/thread").json() == {"is_over": True, "error": ""}
    assert not other.events("to-room")
    wait_until(lambda: server.state()["tables"]["clients"] == 1)


def settled(server: GunicornServer, raw_client: Connect) -> GunicornServer:
    """Return *server* once it has served for a moment: a worker that starts blocks, too."""
    client = raw_client(server)
    assert client.call("slow", 1, 0.3, ack_id=1) == [1]
    client.close()
    return server


def reports(server: GunicornServer, since: float, function: str = "freeze_the_loop") -> list[Any]:
    """Return the log records of the guard that name *function*."""
    return server.records(
        since=since,
        matching=lambda record: (
            record.logger == "flask_socketio_guard"
            and function in record.message + record.traceback
        ),
    )


@pytest.mark.faults(
    BLOCKED_LOOP, stock="nothing says so", because="no log record names what blocks"
)
def test_call_that_blocks_the_event_loop_is_reported_once_with_its_stack_and_length(
    make_fleet: Callable[..., Fleet], raw_client: Connect, measured: Measured
) -> None:
    """The unpatched time.sleep, four times, in the same place."""
    server = settled(make_fleet(app=FLOOD_APP, processes=1, has_queue=False).a, raw_client)
    blocks = counter(server, "loop_blocks")
    since = time.time()
    times = [server.post("/freeze", seconds=seconds) for seconds in (1.0, 0.8, 0.8, 0.8)]
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: len(reports(server, since)) >= 2, timeout=2.0)
    found = reports(server, since)
    assert found, "no log record names what blocks"
    stacks = [record for record in found if "flood_app.py" in record.message + record.traceback]
    first = stacks[0]
    noticed_after = first.time - times[0]["began_at"]
    measured("noticed after", noticed_after)
    measured("records", len(found))
    assert noticed_after < NOTICED_WITHIN + NOISE
    assert first.time < times[0]["ended_at"], "it was reported when it was over"
    assert "monkey.get_original" in first.message + first.traceback
    # Once while it lasts, once with its length; later ones in the same place are counted.
    assert len(found) <= 3, [record.message for record in found]
    lengths = [float(length) for record in found for length in _LENGTH.findall(record.message)]
    assert lengths, "its length was not told"
    assert lengths[0] == pytest.approx(1.0, abs=0.2)
    wait_until(lambda: counter(server, "loop_blocks") == blocks + 4, message="not all are counted")


@pytest.mark.faults(
    BLOCKED_LOOP, stock="nothing says so", because="no log record names what blocks"
)
def test_computation_that_blocks_the_event_loop_is_reported_with_its_stack(
    make_fleet: Callable[..., Fleet], raw_client: Connect, measured: Measured
) -> None:
    """A loop in Python that takes a second and never waits."""
    server = settled(make_fleet(app=FLOOD_APP, processes=1, has_queue=False).a, raw_client)
    since = time.time()
    answer = server.post("/compute", seconds=1.0)
    with contextlib.suppress(DeadlineExceeded):
        wait_until(lambda: reports(server, since, "compute_for"), timeout=2.0)
    found = reports(server, since, "compute_for")
    assert found, "no log record names what blocks"
    measured("noticed after", found[0].time - answer["began_at"])
    assert found[0].time - answer["began_at"] < NOTICED_WITHIN + NOISE


def test_handler_that_waits_does_not_count_as_blocking(
    make_fleet: Callable[..., Fleet], raw_client: Connect
) -> None:
    """A second of waiting as gevent does it is no fault."""
    server = make_fleet(app=FLOOD_APP, processes=1, has_queue=False).a
    since = time.time()
    client = raw_client(server)
    assert client.call("slow", 1, 1.0, ack_id=1) == [1]
    assert not reports(server, since, "gauged")
