"""Acknowledged delivery while everything fails: each message ends, and no end is a lie."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest
import requests

from tests.faults.delivery_app import DELIVERY_APP, IN_REDIS
from tests.faults.delivery_crowd import Crowd, JavaScriptCrowd
from tests.support import wait_until
from tests.support.scale import IS_WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.fleet import Fleet

MESSAGES = os.environ.get("CHAOS_MESSAGES")
CLIENTS = int(os.environ.get("CHAOS_CLIENTS", "20"))
_USUAL = 200 if IS_WHOLE else 80
_BATCH = 20
_ASKED_AT_A_TIME = 500
_HEALTHY = 4.0
"""Seconds for which everything has to go on after an acknowledgement for it to count."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "count",
    [int(MESSAGES)]
    if MESSAGES
    else [200 if IS_WHOLE else 80, pytest.param(600, marks=pytest.mark.long)],
)
def test_each_message_ends_delivered_or_expired_whatever_fails(
    make_fleet: Callable[..., Fleet], measured: Callable[[str, object], None], count: int
) -> None:
    """Workers are killed, and Redis is; clients drop, crash, move and answer late."""
    fleet = make_fleet(
        app=DELIVERY_APP,
        processes=2,
        is_durable=True,
        config={
            IN_REDIS: True,
            "SOCKETIO_GUARD_DELIVERY_ACK_TIMEOUT": 1.0,
            "SOCKETIO_GUARD_DELIVERY_LEASE": 1.0,
            "SOCKETIO_GUARD_DELIVERY_RETENTION": 3600.0,
        },
    )
    chance = random.Random(7)
    names = [f"user-{number}" for number in range(CLIENTS)]
    crowds = [
        Crowd(fleet.servers, names[: CLIENTS // 2]),
        JavaScriptCrowd(fleet.servers, names[CLIENTS // 2 :]),
    ]
    for crowd in crowds:
        crowd.start()
    ids: dict[str, int] = {}
    faults: list[float] = []
    faults_at = {count * at // 8 for at in (1, 3, 5)}
    sent = 0
    try:
        while sent < count:
            values = list(range(sent, sent + _BATCH))
            with contextlib.suppress(requests.RequestException):
                for value in values:
                    to = f"user-{chance.randrange(CLIENTS)}"
                    ttl = 1.0 if chance.random() < 0.02 else 120.0
                    (id,) = chance.choice(fleet.servers).post(
                        "/deliver", values=[value], to=to, ttl=ttl, with_id=True
                    )
                    ids[id] = value
            sent += _BATCH
            for at in [at for at in faults_at if at <= sent]:
                faults_at.remove(at)
                faults.append(time.monotonic())
                if len(faults) == 2:
                    fleet.redis.restart()
                else:
                    os.kill(chance.choice(fleet.servers).worker_pids()[0], signal.SIGKILL)
                faults.append(time.monotonic())
        for crowd in crowds:
            crowd.calm_down()

        ended: dict[str, str] = {}

        def have_all_ended() -> bool:
            open_ids = [id for id in ids if id not in ended][:_ASKED_AT_A_TIME]
            found = fleet.a.post("/receipts", ids=open_ids)
            for id, (state, _) in zip(open_ids, found, strict=True):
                if state not in ("pending", "in_flight"):
                    ended[id] = state
            return len(ended) == len(ids)

        wait_until(have_all_ended, timeout=240, message="some have not ended")
    finally:
        for crowd in crowds:
            crowd.stop()
    memories = [memory for crowd in crowds for memory in crowd.memories.values()]
    copies = {id: found for memory in memories for id, found in memory.copies.items()}
    delivered = [id for id, state in ended.items() if state == "delivered"]
    measured("delivered", f"{len(delivered)} of {len(ids)}")
    measured("expired", sum(state == "expired" for state in ended.values()))
    assert set(ended.values()) <= {"delivered", "expired"}
    assert len(delivered) > 0.9 * len(ids)
    for id in delivered:
        assert any(copy.acknowledged_at for copy in copies[id]), "delivered, says who?"
    twice = {id: found for id, found in copies.items() if len(found) > 1}
    measured("came more than once", len(twice))
    for found in twice.values():
        for earlier, later in itertools.pairwise(found):
            assert not was_heard(earlier, later.at, faults), "it was acknowledged, and came again"
    handled = [count for memory in memories for count in memory.handled.values()]
    measured("handled with deliveries.js", len(handled))
    assert set(handled) == {1}, "a copy was not recognised"


def was_heard(copy: object, until: float, faults: list[float]) -> bool:
    """Return whether an acknowledgement must have been heard before an instant."""
    from tests.faults.delivery_crowd import Copy

    assert isinstance(copy, Copy)
    said_at = copy.acknowledged_at
    if said_at is None or until - said_at < _HEALTHY:
        return False
    if copy.lost_at is not None and copy.lost_at - said_at < _HEALTHY:
        return False
    return not any(said_at - _HEALTHY < fault < said_at + _HEALTHY for fault in faults)
