"""Redis goes away and comes back, or hangs."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.faults.fleet import NOISE, Fleet, Flow, sleep_until, wait_until_delivering
from tests.faults.watches import HealthWatch
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import GunicornServer, SocketIOClient
    from tests.support.servers import LogRecord

    Connect = Callable[..., SocketIOClient]
    Measured = Callable[[str, object], None]

_BROKER_LOGGERS = ("flask_socketio_guard", "socketio", "engineio", "redis")


def broker_records(server: GunicornServer, *, since: float) -> list[LogRecord]:
    """Return the log records that anything between the application and Redis wrote."""
    return server.records(
        since=since,
        matching=lambda record: (
            record.logger.startswith(_BROKER_LOGGERS)
            and "event loop" not in record.message  # a machine that stops has stopped that, too
        ),
    )


@pytest.mark.faults(
    "Redis down 2 / 10 / 35 s",
    stock="deaf 1 / 5 / 28 s longer; 1,410 log lines, none with the reason; all events lost",
    because=r"[1-9]\d* of \d+ events lost",
)
@pytest.mark.parametrize(
    ("async_mode", "seconds"),
    [
        pytest.param("gevent", 2.0, marks=pytest.mark.timeout(60)),
        pytest.param("gevent", 10.0, marks=[pytest.mark.timeout(90), pytest.mark.long]),
        pytest.param("gevent", 35.0, marks=[pytest.mark.timeout(150), pytest.mark.long]),
        pytest.param("threading", 2.0, marks=pytest.mark.timeout(60)),
    ],
)
def test_events_flow_and_none_is_lost_when_redis_was_down(
    seconds: float, fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """Redis is killed under a flow of 20 events per second, and started again."""
    witness, other = sio_client(fleet.a), sio_client(fleet.b)
    wait_until_delivering(fleet.b, witness)
    wait_until_delivering(fleet.a, other)
    with (
        HealthWatch(fleet.a, "/healthz", "/readyz", "/livez") as health,
        Flow(fleet.b, witness, rate=20) as flow,
    ):
        down_at, since = time.monotonic(), time.time()
        fleet.redis.kill()
        sleep_until(down_at + seconds)
        up_at = fleet.redis.start()
        deaf = flow.wait_for_arrival_after(
            up_at, timeout=seconds + 15, message="the listener is deaf"
        )
        measured("first event after", deaf)
        measured(
            "log records",
            " + ".join(str(len(broker_records(server, since=since))) for server in fleet.servers),
        )
        wait_until(lambda: flow.received()[-1].args[0]["emitted_at"] > up_at, timeout=10)
        emitted, slowest = flow.stop()
        lost = flow.wait_for_all(emitted, timeout=3)
        measured("lost", f"{lost} of {emitted}")
        measured("slowest emit", slowest)
    assert lost == 0, f"{lost} of {emitted} events lost"
    assert flow.numbers() == list(range(emitted))
    assert deaf < 1.0 + NOISE
    assert slowest < NOISE
    wait_until_delivering(fleet.a, other, message="what the other process emits is lost")
    for server in fleet.servers:
        assert_logged_down_and_up(server, since=since)
    while_down = [seen for seen in health.observations("/healthz") if seen.at < up_at]
    assert "reconnecting" in {seen.listener for seen in while_down}
    # Unless told otherwise, a broker that all processes miss is no reason to take this one out.
    assert {seen.status for seen in health.observations("/readyz")} == {200}
    assert {seen.status for seen in health.observations("/livez")} == {200}


def assert_logged_down_and_up(server: GunicornServer, *, since: float) -> None:
    """Assert one log record on the way down, with the reason, and one on the way up.

    Or two of each: that a connection broke may be seen after a new one was answered.
    """
    wait_until(
        lambda: len(broker_records(server, since=since)) >= 2,
        message="the outage was not logged on the way down and up",
    )
    records = broker_records(server, since=since)
    assert len(records) in (2, 4), "\n".join(record.message for record in records)
    assert {record.logger for record in records} == {"flask_socketio_guard"}
    assert records[0].level in {"WARNING", "ERROR"}
    reason = re.search(r"refused|reset|closed|Error", records[0].message, re.IGNORECASE)
    assert reason, records[0].message


@pytest.mark.faults(
    "Redis hangs 10 s (SIGSTOP) at 20 events/s",
    stock="each emit blocks up to 10 s, an HTTP request with it; 96 of 540 out of order",
    because=r"a request with an emit took [1-9]\d*\.\d s, [1-9]\d* of \d+ events out of order",
)
@pytest.mark.timeout(90)
def test_emit_returns_at_once_and_order_is_kept_while_redis_hangs(
    fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """HTTP requests emit 20 events per second, and Redis answers nothing for 10 s."""
    witness, other = sio_client(fleet.a), sio_client(fleet.b)
    wait_until_delivering(fleet.b, witness)
    wait_until_delivering(fleet.a, other)
    event = f"hang-{time.monotonic()}"

    def emit() -> float:
        asked_at = time.monotonic()
        fleet.b.post("/emit", event=event, timeout=30)
        return time.monotonic() - asked_at

    rate, healthy, hanging = 20, 1.0, 10.0
    began_at = time.monotonic()
    is_paused = False
    with ThreadPoolExecutor(300) as requests:
        pending = []
        try:
            for number in range(int(rate * (healthy + hanging))):
                sleep_until(began_at + number / rate)
                if not is_paused and number >= rate * healthy:
                    fleet.redis.pause()
                    is_paused = True
                pending.append(requests.submit(emit))
        finally:
            fleet.redis.resume()
        slowest = max(request.result() for request in pending)
    witness.wait_for(event, count=1)
    with contextlib.suppress(AssertionError):
        witness.wait_for(event, count=len(pending), timeout=5)
    numbers = [item.args[0]["number"] for item in witness.events(event)]
    displaced = sum(after < before for before, after in itertools.pairwise(numbers))
    measured("slowest request", slowest)
    measured("out of order", f"{displaced} of {len(pending)}")
    measured("lost", len(pending) - len(set(numbers)))
    assert slowest < 1.0 + NOISE, (
        f"a request with an emit took {slowest:.1f} s, "
        f"{displaced} of {len(pending)} events out of order"
    )
    assert numbers == list(range(len(pending)))
