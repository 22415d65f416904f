"""``rate=``: whose events are counted together; joining a namespace again renews nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import flask
import pytest

from flask_socketio_guard import ConfigError, SocketIOGuard
from tests import unit_support, unit_websocket
from tests.unit_websocket import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import RedisServer
    from tests.unit_websocket import Peer, Served

pytestmark = [pytest.mark.timeout(30)]
nothing_left_behind = unit_support.nothing_left_behind
make_served = unit_websocket.make_served


def rated(make_served: Callable[..., Served], kind: str = KINDS[0], **options: Any) -> Served:
    """Return an application with an event ``tick`` that is let through twice an hour."""
    storage = options.pop("rate_storage", "memory://")
    served = make_served(kind, rate_storage=storage)
    assert served.guard is not None
    served.guard.on("tick", rate="2/hour", **options)(lambda: "done")

    @served.guard.on("identify")
    def identify(name: str) -> None:
        assert served.guard is not None
        served.guard.identify(flask.request.sid, name)  # type: ignore[attr-defined]

    return served


def ticks(client: Peer, count: int) -> int:
    """Send so many events; return how many were let through."""
    found = []
    for _ in range(count):
        client.send('421["tick"]')
        found.append(json.loads(client.read_until("431")[3:]))
    return found.count(["done"])


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_a_client_that_joins_again_has_no_new_rate(
    make_served: Callable[..., Served], kind: str
) -> None:
    client = rated(make_served, kind).joined()
    let_through = ticks(client, 3)
    for _ in range(3):
        client.send("41")
        client.join()
        let_through += ticks(client, 3)
    assert let_through == 2


def test_rates_are_those_of_a_session_an_identity_or_an_address(
    make_served: Callable[..., Served],
) -> None:
    for per, expected in ("session", [2, 2, 2]), ("identity", [2, 0, 2]), ("address", [2, 0, 0]):
        served = rated(make_served, rate_per=per)
        found = []
        for name in "ann", "ann", "bob":
            client = served.joined()
            client.send(f'422["identify","{name}"]')
            client.read_until("432")
            found.append(ticks(client, 3))
        assert found == expected, per


def test_a_rate_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        SocketIOGuard().on("tick", rate="2/hour", rate_per="room")
    assert str(caught.value) == (
        "rate_per must be one of 'session', 'identity', 'address', not 'room'"
    )


def test_applications_on_one_redis_share_no_counts(
    make_served: Callable[..., Served], redis_server: RedisServer
) -> None:
    served = rated(make_served, rate_storage=redis_server.url)
    assert ticks(served.joined(), 3) == 2
    keys = redis_server.command("KEYS", "*")
    assert keys
    assert all(b"socketio-guard:served/" in key for key in keys)
