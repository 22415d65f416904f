"""What the Redis of the delivery store is asked by processes that have nothing to do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.delivery_app import DELIVERY_APP, IN_REDIS
from tests.faults.fleet import NOISE
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import RedisServer, SocketIOClient

SECONDS = 12.0


def commands(redis: RedisServer) -> dict[str, int]:
    """Return how often each command ran, also in scripts."""
    stats = redis.command("INFO", "commandstats")
    return {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}


@pytest.fixture(params=["gevent", "threading"])
def async_mode(request: pytest.FixtureRequest) -> str:
    """Both."""
    return str(request.param)


@pytest.mark.timeout(90)
def test_idle_processes_ask_redis_seldom(
    make_fleet: Callable[..., Fleet],
    make_redis: Callable[[], RedisServer],
    sio_client: Callable[..., SocketIOClient],
) -> None:
    """Two processes, with a device each; a message waits."""
    redis = make_redis()
    fleet = make_fleet(
        app=DELIVERY_APP,
        processes=2,
        config={"SOCKETIO_GUARD_DELIVERY_STORE": redis.url},
    )
    for server in fleet.servers:
        sio_client(server, query="identity=ann")
    fleet.a.post("/deliver", values=[1], to="bob")
    # Each process has begun.
    wait_until(lambda: bool(redis.command("KEYS", "*:leader")))
    before, began_at = commands(redis), time.monotonic()
    time.sleep(SECONDS)
    seconds = time.monotonic() - began_at
    asked = {name: count - before.get(name, 0) for name, count in commands(redis).items()}
    for name in ("info", "client", "hello"):  # of this test
        asked.pop(name, None)
    assert asked["zrange"] > seconds, "somebody looks at what expires"
    assert sum(asked.values()) <= 20 * seconds, asked


def test_a_message_expires_in_time_however_long_the_lease_is(
    make_fleet: Callable[..., Fleet],
) -> None:
    """The leader looks more often than it renews its lease."""
    fleet = make_fleet(
        app=DELIVERY_APP,
        config={IN_REDIS: True, "SOCKETIO_GUARD_DELIVERY_LEASE": 60.0},
    )
    for server in (fleet.a, fleet.b):  # one of them leads
        began_at = time.monotonic()
        (id,) = server.post("/deliver", values=[1], to="ann", ttl=1.0)
        assert server.post("/wait", id=id, seconds=20) == "expired"
        assert 1.0 <= time.monotonic() - began_at < 1.25 + NOISE
