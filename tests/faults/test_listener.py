"""The listener of the message queue dies, goes deaf, or was never started."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.fleet import (
    NOISE,
    Fleet,
    Flow,
    counter,
    sleep_until,
    wait_until_delivering,
)
from tests.faults.watches import HealthWatch
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import GunicornServer, SocketIOClient
    from tests.support.servers import LogRecord

    Connect = Callable[..., SocketIOClient]
    Measured = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(60)

both_modes = pytest.mark.parametrize("async_mode", ["gevent", "threading"])

LISTENER_ENDS = "listener greenlet killed, or `listen()` returns"
HALF_OPEN = "connection to Redis half-open, new ones work"
SUBSCRIBERS_KILLED = "`CLIENT KILL TYPE pubsub` at 100 events/s"
NO_CLIENT_YET = "no client yet"


def guard_records(server: GunicornServer, *, since: float) -> list[LogRecord]:
    """Return the warnings and errors of the guard."""
    return server.records(
        since=since,
        matching=lambda record: (
            record.logger == "flask_socketio_guard" and record.level in {"WARNING", "ERROR"}
        ),
    )


@pytest.mark.faults(LISTENER_ENDS, stock="deaf forever", because="the listener is deaf")
def test_listener_delivers_again_when_its_greenlet_is_killed(
    fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """Somebody kills the greenlet that listens to the queue."""
    witness = sio_client(fleet.a)
    wait_until_delivering(fleet.b, witness)
    restarts_before, workers = counter(fleet.a, "listener_restarts"), fleet.a.worker_pids()
    with Flow(fleet.b, witness, rate=50) as flow:
        killed_at = time.monotonic()
        assert fleet.a.post("/listener/kill") == 1
        # The greenlet dies in the next turn of the event loop; what is emitted until then may
        # still arrive.
        deaf = flow.wait_for_emission_after(
            killed_at + 0.1, timeout=5, message="the listener is deaf"
        )
    measured("delivering again after", deaf + 0.1)
    assert deaf + 0.1 < 1.0 + NOISE
    assert counter(fleet.a, "listener_restarts") == restarts_before + 1
    assert fleet.a.worker_pids() == workers


@pytest.mark.faults(LISTENER_ENDS, stock="deaf forever", because="the listener is deaf")
@both_modes
def test_listener_delivers_again_when_listen_returns(
    make_fleet: Callable[..., Fleet], sio_client: Connect, measured: Measured
) -> None:
    """The queue class is the application's own, and its ``_listen`` returns."""
    fleet = make_fleet(queue="returning")
    witness = sio_client(fleet.a)
    wait_until_delivering(fleet.b, witness)
    returned_at = time.monotonic()
    fleet.a.post("/listener/return")
    # The first of these events is the one with which _listen returns.
    wait_until_delivering(fleet.b, witness)
    measured("delivering again after", time.monotonic() - returned_at)
    assert time.monotonic() - returned_at < 1.0 + NOISE


@pytest.mark.faults(
    HALF_OPEN,
    stock="deaf forever, no log line, health 200",
    because="the listener is deaf",
)
@both_modes
def test_half_open_connection_is_noticed_and_replaced(
    make_fleet: Callable[..., Fleet], sio_client: Connect, measured: Measured
) -> None:
    """The connections of one process to Redis swallow everything; new connections work."""
    fleet = make_fleet(is_proxied=True)
    witness, other = sio_client(fleet.a), sio_client(fleet.b)
    wait_until_delivering(fleet.b, witness)
    wait_until_delivering(fleet.a, other)
    with (
        HealthWatch(fleet.a, "/readyz", "/livez") as health,
        Flow(fleet.b, witness, rate=20) as flow,
    ):
        lost_at, since = time.monotonic(), time.time()
        assert fleet.proxies[0].black_hole() > 0
        # What was between the two processes at that moment may still arrive.
        deaf = flow.wait_for_emission_after(
            lost_at + 0.2, timeout=8, message="the listener is deaf"
        )
        deaf += 0.2
        measured("delivering again after", deaf)
        wait_until(
            lambda: health.first("/readyz", lambda seen: seen.status == 200, since=lost_at + deaf),
            message="/readyz does not come back to 200",
        )
    assert deaf < 4.0 + NOISE
    assert {seen.status for seen in health.observations("/livez")} == {200}
    records = guard_records(fleet.a, since=since)
    assert records, "nothing was logged"
    measured("known after", records[0].time - since)
    assert records[0].time - since < 3.0 + NOISE
    wait_until_delivering(fleet.a, other, message="what this process emits is lost")


@pytest.mark.faults(
    HALF_OPEN,
    stock="nothing shows it",
    because="/readyz does not say so",
)
def test_readiness_is_withdrawn_while_new_subscriptions_are_half_open_too(
    make_fleet: Callable[..., Fleet], sio_client: Connect, measured: Measured
) -> None:
    """Every connection that subscribes swallows everything; others to the same Redis work."""
    fleet = make_fleet(is_proxied=True)
    witness, proxy = sio_client(fleet.a), fleet.proxies[0]
    wait_until_delivering(fleet.b, witness)
    with HealthWatch(fleet.a, "/readyz", "/livez") as health:
        lost_at = time.monotonic()
        proxy.swallow(b"SUBSCRIBE")
        proxy.black_hole()
        try:
            withdrawn = wait_until(
                lambda: health.first("/readyz", lambda seen: seen.status == 503, since=lost_at),
                message="the listener is deaf, and /readyz does not say so",
            )
            assert withdrawn is not None
            measured("known after", withdrawn.at - lost_at)
            assert withdrawn.at - lost_at < 3.0 + NOISE
            # Long enough for several subscriptions, each of which gets lost.
            sleep_until(lost_at + 8.0)
        finally:
            proxy.swallow(None)
        mended_at = time.monotonic()
        statuses = {seen.status for seen in health.observations("/readyz", since=withdrawn.at)}
        assert statuses == {503}
        wait_until_delivering(fleet.b, witness, timeout=15)
        measured("delivering again after", time.monotonic() - mended_at)
        # At worst an attempt began just before, and is given up after the longest delay.
        assert time.monotonic() - mended_at < 3.0 + 5.0 + NOISE
        wait_until(
            lambda: health.first("/readyz", lambda seen: seen.status == 200, since=mended_at),
            message="/readyz does not come back to 200",
        )
    assert {seen.status for seen in health.observations("/livez")} == {200}


@pytest.mark.faults(
    SUBSCRIBERS_KILLED,
    stock="1.0 to 1.3 s deaf, 100 lost: the listener sleeps although the connection is back",
    because=r"deaf for 1\.\d+ s, \d{2,3} events lost",
)
@both_modes
def test_subscription_that_redis_ends_is_renewed_at_once(
    fleet: Fleet, sio_client: Connect, measured: Measured
) -> None:
    """Redis closes all subscribed connections under a flow of 100 events per second."""
    witness, other = sio_client(fleet.a), sio_client(fleet.b)
    wait_until_delivering(fleet.b, witness)
    wait_until_delivering(fleet.a, other)
    with Flow(fleet.b, witness, rate=100) as flow:
        wait_until(lambda: len(flow.received()) >= 50)
        killed_at = time.monotonic()
        assert fleet.redis.command("CLIENT", "KILL", "TYPE", "pubsub") >= 2
        wait_until(
            lambda: len([item for item in flow.received() if item.at > killed_at]) >= 50,
            message="the listener is deaf",
        )
        emitted, _ = flow.stop()
    lost = flow.wait_for_all(emitted, timeout=0.5)
    deaf = flow.longest_silence(since=killed_at, until=flow.received()[-1].at)
    measured("deaf", deaf)
    measured("lost", lost)
    # Stock is deaf for its sleep of one second, and never shorter.
    assert deaf < 0.3 + NOISE, f"deaf for {deaf:.2f} s, {lost} events lost"
    assert lost < 50, f"deaf for {deaf:.2f} s, {lost} events lost"


@pytest.mark.faults(
    NO_CLIENT_YET,
    stock="listener not running, nothing shows it",
    because="Redis counts 0 subscribers",
)
@both_modes
def test_listener_runs_before_the_first_client_and_health_says_so(
    make_fleet: Callable[..., Fleet], measured: Measured
) -> None:
    """The process serves and no client has come yet."""
    # Options that no other test uses: the process is new.
    fleet = make_fleet(processes=1, config={"TESTING": True})
    served_at = time.monotonic()
    wait_until(
        fleet.redis.subscribers, timeout=3, message="Redis counts 0 subscribers, nobody listens"
    )
    measured("listening after", time.monotonic() - served_at)

    def is_ready() -> bool:
        answer = fleet.a.get("/readyz")
        body = answer.json()
        return answer.status_code == 200 and body["listener"] == "running"

    wait_until(is_ready, timeout=3, message="/readyz does not say that the listener runs")
    assert fleet.a.state()["tables"]["environs"] == 0
