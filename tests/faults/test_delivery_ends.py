"""Every end of a message is told, also if the answer is lost or the process dies."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.faults.delivery_app import DELIVERY_APP, DIES, IN_REDIS
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet
    from tests.support import RawClient

pytestmark = pytest.mark.timeout(60)

COUNT = 20
CONFIG = {
    IN_REDIS: True,
    "SOCKETIO_GUARD_DELIVERY_LEASE": 1.0,
    "SOCKETIO_GUARD_BROKER_TIMEOUT": 1.0,
}


@pytest.fixture(params=["gevent", "threading"])
def async_mode(request: pytest.FixtureRequest) -> str:
    """Both."""
    return str(request.param)


def told(fleet: Fleet, ids: list[str]) -> list[Any]:
    """Return the dead letters among *ids* that hooks have received, in all processes."""
    calls = [call for server in fleet.servers for call in server.state()["calls"]]
    return [call[1:] for call in calls if call[0] == "dead" and call[1] in ids]


def counted(fleet: Fleet) -> int:
    """Return the dead letters that all processes have counted."""
    states = [server.state()["guard"]["counters"] for server in fleet.servers]
    return sum(counters.get("deliveries_dead", 0) for counters in states)


def wait_until_told(
    fleet: Fleet, ids: list[str], state: str, measured: Callable[[str, object], None]
) -> None:
    """Wait for the hook of each message, and look whether it got what it needs."""
    try:
        wait_until(lambda: len({id for id, *_ in told(fleet, ids)}) == len(ids), timeout=15.0)
    finally:
        calls = told(fleet, ids)
        distinct = len({id for id, *_ in calls})
        measured("hooks", f"{distinct} of {len(ids)}, {len(calls)} calls")
    assert sorted(calls) == sorted([id, state, [number]] for number, id in enumerate(ids))


def test_messages_that_expired_without_an_answer_are_told(
    make_fleet: Callable[..., Fleet], measured: Callable[[str, object], None]
) -> None:
    """The connection is cut between the end and the answer of the store."""
    fleet = make_fleet(app=DELIVERY_APP, is_proxied=True, config=CONFIG)
    counted_before = counted(fleet)
    for proxy in fleet.proxies:
        proxy.swallow_answers(b"\r\nexpire\r\n")
    ids = fleet.a.post("/deliver", values=list(range(COUNT)), to="nobody", ttl=1.0)
    waiting = fleet.redis.command("KEYS", "socketio-guard:*deadlines")[0]
    wait_until(lambda: fleet.redis.command("ZCARD", waiting) == 0, timeout=15.0)
    assert sum(proxy.muted for proxy in fleet.proxies)
    for proxy in fleet.proxies:
        proxy.swallow_answers(None)
    wait_until_told(fleet, ids, "expired", measured)
    assert counted(fleet) - counted_before == COUNT


def test_messages_that_are_gone_while_redis_stands_still_are_told(
    make_fleet: Callable[..., Fleet],
    raw_client: Callable[..., RawClient],
    measured: Callable[[str, object], None],
) -> None:
    """Redis does what it was asked for when it goes on, and nobody waits for the answer."""
    fleet = make_fleet(app=DELIVERY_APP, config=CONFIG)
    clients = [raw_client(fleet.b) for _ in range(COUNT)]
    ids = [
        id
        for number, client in enumerate(clients)
        for id in fleet.a.post("/deliver", values=[number], to=client.sid)
    ]
    fleet.redis.pause()
    try:
        for client in clients:
            client.close()
        time.sleep(3.0)  # the fault itself: longer than the process waits for an answer
    finally:
        fleet.redis.resume()
    wait_until_told(fleet, ids, "gone", measured)


def test_ends_of_a_leader_that_is_killed_after_the_step_are_told(
    make_fleet: Callable[..., Fleet], measured: Callable[[str, object], None]
) -> None:
    """The store has the end, and the process dies before it can tell."""
    fleet = make_fleet(app=DELIVERY_APP, config=CONFIG | {DIES: True})
    pids = {server.state()["pid"] for server in fleet.servers}
    ids = fleet.a.post("/deliver", values=list(range(COUNT)), to="nobody", ttl=1.0)

    def is_restarted() -> bool:
        with contextlib.suppress(requests.RequestException):
            return {server.state()["pid"] for server in fleet.servers} != pids
        return False

    wait_until(is_restarted, timeout=20.0)
    wait_until_told(fleet, ids, "expired", measured)
